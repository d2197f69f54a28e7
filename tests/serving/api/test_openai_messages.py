"""What clients keep in the histories that they send, and how it reaches the chat template."""

from typing import Any

import pytest

from emberkv.errors import RequestError
from emberkv.serving.api.conversation import ToolChoice
from emberkv.serving.api.openai_messages import MessageReader, template_messages, template_tools, tool_choice_of
from emberkv.serving.api.openai_schema import ChatCompletionRequest

HI = {"role": "user", "content": "Hi"}


def call(arguments: object, **fields: object) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}


def answered(**fields: object) -> dict[str, Any]:
    """How an assistant's message with these fields is read."""
    (message,) = template_messages([{"role": "assistant", **fields}])
    return message


def test_contents_that_are_null() -> None:
    assert answered(content=None) == {"role": "assistant", "content": ""}
    assert answered() == {"role": "assistant", "content": ""}
    assert answered(content=None, tool_calls=[]) == {"role": "assistant", "content": ""}
    assert template_messages([{"role": "tool", "tool_call_id": "a", "content": None}]) == [
        {"role": "tool", "content": "", "tool_call_id": "a"}
    ]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ('{"x": 10.0}', {"x": 10.0}),
        ({"x": 1}, {"x": 1}),
        ("", {}),
        (None, {}),
        ('{"x": ', '{"x": '),
        ("[1]", "[1]"),
    ],
)
def test_arguments_are_an_object_or_what_the_model_wrote(given: object, read: object) -> None:
    (made,) = answered(tool_calls=[call(given)])["tool_calls"]
    assert made == {"id": "a", "type": "function", "function": {"name": "f", "arguments": read}}


def test_a_call_of_a_custom_tool_has_its_text_as_input() -> None:
    (made,) = answered(tool_calls=[{"id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}}])["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"input": "x"}}


@pytest.mark.parametrize("fields", [{"reasoning_content": "Hm."}, {"reasoning": "Hm."}])
def test_thoughts_reach_the_template(fields: dict[str, str]) -> None:
    assert answered(content="Yes", **fields) == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}


def test_thoughts_among_the_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "Yes"},
        {"type": "refusal", "refusal": "No"},
    ]
    assert answered(content=parts) == {"role": "assistant", "content": "Yes\nNo", "reasoning_content": "Hm."}


def test_a_picture_has_a_placeholder_and_is_counted() -> None:
    reader = MessageReader()
    content = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "What is it?"}]
    (message,) = reader.messages([{"role": "user", "content": content}])
    assert message["content"] == "[image left out]\nWhat is it?"
    assert reader.left_out == {"image_url": 1}


def test_the_former_form_of_calls_and_results() -> None:
    calling, result = template_messages(
        [
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "2"},
        ]
    )
    (made,) = calling["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"x": 1}}
    assert result == {"role": "tool", "content": "2", "name": "f", "tool_call_id": made["id"]}


def test_tools_that_are_no_functions_are_counted() -> None:
    function = {"type": "function", "function": {"name": "f"}}
    left_out = MessageReader().left_out
    tools = [{**function, "cache_control": {"type": "ephemeral"}}, {"type": "custom", "custom": {"name": "g"}}]
    assert template_tools(tools, left_out) == [function]
    assert left_out == {"custom": 1}


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "g"}}, ToolChoice("required", ("g",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOLS[0]]}},
            ToolChoice("auto", ("f",)),
        ),
    ],
)
def test_every_tool_choice(given: object, expected: ToolChoice) -> None:
    assert tool_choice_of(given, TOOLS, parallel=True) == expected


@pytest.mark.parametrize(
    "given",
    [
        "any",
        {"type": "function", "function": {"name": "h"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}},
    ],
)
def test_what_is_no_tool_choice(given: object) -> None:
    with pytest.raises(RequestError) as refused:
        tool_choice_of(given, TOOLS, parallel=True)
    assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {"enable_thinking": True}),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, {"enable_thinking": True}),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ],
)
def test_how_much_to_think_reaches_the_template(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [HI], **fields})
    assert request.conversation().variables == variables


def test_unknown_fields_are_counted_and_those_without_effect_are_not() -> None:
    fields = {"verbosity": "low", "nonsense": None, "user": "me", "store": True, "metadata": {"a": "b"}}
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [HI], **fields})
    assert request.conversation().left_out == {"verbosity": 1}
