"""What a model, or a tool's schema, may say that JSON or UTF-8 cannot."""

import json
from typing import Any

import pytest

from emberkv.serving.parsing.events import ParsedMessage
from emberkv.serving.parsing.formats import OutputFormat, parse_output
from emberkv.serving.parsing.schema_values import ParameterTypes, json_value


def tool(schema: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}


def parsed(tools: str, text: str) -> ParsedMessage:
    return parse_output(OutputFormat(tools), text, tools=[tool({})])


def test_arguments_with_nan_are_not_complete() -> None:
    (call,) = parsed("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>').calls
    assert (call.arguments, call.is_complete) == ('{"a": NaN}', False)


def test_half_of_a_surrogate_pair_in_a_value_stays_escaped() -> None:
    (call,) = parsed("pythonic", r"[f(a='x\ud800')]").calls
    assert call.arguments == r'{"a": "x\ud800"}'
    assert json.loads(call.arguments) == {"a": "x\ud800"}


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ("hermes", r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
        ("hermes", r'<tool_call>{"id": "\ud800", "name": "f", "arguments": {}}</tool_call>'),
        ("gemma", r'<|tool_call>call:f{a:"\ud800"}<tool_call|>'),
    ],
)
def test_what_is_read_of_half_a_surrogate_pair_can_be_encoded(tools: str, text: str) -> None:
    message = parsed(tools, text)
    assert r"\ud800" in message.content
    for call in message.calls:
        assert (call.arguments.encode(), call.is_complete) == (b'{"a": ', False)


def test_each_reference_of_a_schema_is_followed_once() -> None:
    looping = {"anyOf": [{"type": "string"}, *[{"$ref": "#/properties/a"}] * 100]}
    assert ParameterTypes([tool(looping)]).of("f", "a") == {"string"}


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"enum": 5}, {"allOf": None}, {"type": {}}])
def test_a_schema_that_says_nothing_gives_no_types(schema: object) -> None:
    assert ParameterTypes([tool(schema)]).of("f", "a") == frozenset()


@pytest.mark.parametrize(
    ("text", "types", "wanted"),
    [
        ("{'x': True, 'y': [None]}", {"object"}, '{"x": true, "y": [null]}'),
        ("['a', 1]", {"array", "null"}, '["a", 1]'),
        ("{'x': True}", {"string"}, "\"{'x': True}\""),
        ("{'x': f()}", {"object"}, "\"{'x': f()}\""),
        ("{1, 2}", {"array"}, '"{1, 2}"'),
    ],
)
def test_python_collections_become_json_where_the_schema_wants_one(text: str, types: set[str], wanted: str) -> None:
    assert json_value(text, frozenset(types)) == wanted
