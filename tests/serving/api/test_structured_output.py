"""Fields of requests become constraints, in OpenAI's forms and in vLLM's."""

import json
from typing import Any

import pytest

from emberkv.engine.request import Constraint
from emberkv.errors import RequestError
from emberkv.serving.api.conversation import constraint_of_body, constraint_of_response_format

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}}
OF_SCHEMA = Constraint("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("given", "constraint"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint("json_object")),
        ({"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}, OF_SCHEMA),
        ({"type": "json_schema", "name": "a", "schema": SCHEMA}, OF_SCHEMA),
    ],
)
def test_a_response_format_is_a_constraint(given: object, constraint: Constraint | None) -> None:
    assert constraint_of_response_format(given) == constraint


@pytest.mark.parametrize(
    ("body", "constraint"),
    [
        ({}, None),
        ({"guided_json": SCHEMA}, OF_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, OF_SCHEMA),
        ({"guided_regex": "[0-9]+"}, Constraint("regex", "[0-9]+")),
        ({"guided_choice": ["yes", 'say "no"']}, Constraint("lark", 'start: "yes" | "say \\"no\\""')),
        ({"guided_grammar": 'start: "a"'}, Constraint("lark", 'start: "a"')),
        ({"guided_grammar": 'root ::= "a"'}, Constraint("lark", '%llguidance {}\n\nstart: "a"\n')),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, OF_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_object")),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, Constraint("regex", "a")),
    ],
)
def test_vllms_fields_are_constraints(body: dict[str, Any], constraint: Constraint | None) -> None:
    assert constraint_of_body(body) == constraint


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "is 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "Invalid type: x",
        ),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_regex": 3}, "guided_regex", "must be a string"),
        ({"guided_choice": []}, "guided_choice", "list of strings"),
        ({"guided_grammar": "::= ("}, "guided_grammar", "guided_grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "use one of json"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "has 2 formats"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "are both given"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        constraint_of_body(body)
    assert refused.value.param == param
