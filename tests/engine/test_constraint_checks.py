"""A constraint that cannot be compiled is refused, and the message says where; no tokenizer is needed for that."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from emberkv.engine.constraints import check_constraint, grammar_of
from emberkv.engine.request import MAX_CONSTRAINT_BYTES, Constraint
from emberkv.errors import RequestError


def schema(**properties: object) -> str:
    return json.dumps({"type": "object", "properties": properties, "$defs": {"unique": {"uniqueItems": True}}})


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json_object"),
        Constraint("json_schema", '{"type": "object"}'),
        Constraint("json_schema", '{"uniqueItems": true}', lenient=True),
        Constraint("regex", "[0-9]{3}"),
        Constraint("lark", 'start: "a" | "b"'),
    ],
)
def test_what_can_be_compiled_is_given_back(constraint: Constraint) -> None:
    assert check_constraint(constraint) is constraint


@pytest.mark.parametrize("constraint", [Constraint("json_object"), Constraint("json_schema", schema(a={}))])
@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('{"a":[1,{"b":2}]}', True),
        ('{"a": [1, {"b": 2}]}', True),
        (json.dumps({"a": [1, {"b": 2}]}, indent=4), True),
        (json.dumps({"a": [1, {"b": 2}]}, indent="\t"), True),
        ('{"a":  1}', False),
        ('{\n\n"a":1}', False),
    ],
)
def test_json_may_be_compact_or_indented_and_has_no_white_space_beyond(
    constraint: Constraint, text: str, is_allowed: bool
) -> None:
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(constraint))
    data = list(text.encode())
    assert (matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()) == is_allowed


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("json_schema", '{"type": "obj'), "it is not valid JSON: Unterminated .* column 10"),
        (
            Constraint("json_schema", '{"not":' * 50_000 + "{}" + "}" * 50_000),
            "it is not valid JSON: .*recursion",
        ),
        (Constraint("json_schema", "[1]"), "it is list; a JSON schema is an object"),
        (Constraint("json_schema", '{"x-guidance": {"lenient": true}}'), "it has x-guidance, .*; leave it out"),
        (Constraint("json_schema", '{"type": "thing"}'), "#: Invalid type: thing"),
        (
            Constraint("json_schema", schema(a={"items": {"type": "thing"}})),
            "#/properties/a/items: Invalid type: thing",
        ),
        (Constraint("json_schema", schema(a={"anyOf": [{}, {"format": "moon"}]})), "#/properties/a/anyOf/1: .*moon"),
        (Constraint("json_schema", schema(a={"$ref": "#/$defs/unique"})), "#/.defs/unique: .*uniqueItems"),
        (Constraint("regex", "(a"), "at 1.*unclosed group"),
        (Constraint("lark", "start: nowhere"), "at 1.*nowhere"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_its_place(constraint: Constraint, reason: str) -> None:
    with pytest.raises(RequestError, match=f"^field cannot be compiled: {reason}") as refused:
        check_constraint(constraint, "field")
    assert refused.value.param == "field"
    assert "\n" not in str(refused.value)


def test_kind_and_size_are_checked() -> None:
    with pytest.raises(RequestError, match="constraint is 'xml'; it must be one of json_schema, json_object"):
        Constraint("xml")  # type: ignore[arg-type]  # what a caller may give all the same
    with pytest.raises(RequestError, match=f"has {MAX_CONSTRAINT_BYTES + 1} bytes"):
        Constraint("regex", "a" * (MAX_CONSTRAINT_BYTES + 1))
