"""Checks of the constraints for structured output, which llguidance compiles to masks over the vocabulary."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from emberkv.engine.request import Constraint
from emberkv.errors import RequestError, reason_of

GRAMMAR_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms for one mask
    step_max_items=50_000,
    max_lexer_states=50_000,  # of 1 to 2 kB each
    max_grammar_size=500_000,
    verbose_errors=False,  # these texts may be logged, and the grammar is the client's
)
"""Bounds of a grammar's work, while it is compiled and for each mask, and of its memory."""

GUIDANCE_OPTIONS = "x-guidance"
"""The keyword by which llguidance takes options within a JSON schema. Requests may not set it."""

JSON_WHITESPACE = r" ?|\n[ \t]{0,32}"
"""Between two tokens of JSON: what compact and indented texts have. Without a bound, a weak model may fill its answer
with white space.
"""

_MAX_TRIES = 200
_SUBSCHEMA = frozenset({"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"})
_DEFINITIONS = ("$defs", "definitions")
_SUBSCHEMA_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", *_DEFINITIONS})
_SUBSCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})


def check_constraint(constraint: Constraint, param: str = "constraint") -> Constraint:
    """Return the constraint if it can be compiled. This needs no tokenizer, so a process without a model can check.

    param: the request's field that the constraint comes from, for errors.

    Raises RequestError for a constraint that cannot be compiled, and names the place in the schema or the grammar.
    """
    fault = _fault(constraint)
    if fault is not None:
        raise RequestError(f"{param} cannot be compiled: {fault}", param=param)
    return constraint


@lru_cache(maxsize=64)
def _fault(constraint: Constraint) -> str | None:
    """Why the constraint cannot be compiled; None if it can."""
    schema: Any = None
    if constraint.kind == "json_schema":
        try:
            schema = json.loads(constraint.text)
        except (ValueError, RecursionError) as error:
            return f"it is not valid JSON: {reason_of(error)}"
        if not isinstance(schema, dict | bool):
            return f"it is {type(schema).__name__}; a JSON schema is an object"
        if isinstance(schema, dict) and GUIDANCE_OPTIONS in schema:
            return f"it has {GUIDANCE_OPTIONS}, which is not a keyword of JSON Schema; leave it out"
    message = _message_about(grammar_of(constraint))
    if message is None:
        return None
    place = f"{_place(schema, message, constraint.lenient)}: " if isinstance(schema, dict) else ""
    return reason_of(ValueError(f"{place}{_without_listing(message)}"))


def _message_about(grammar: str) -> str | None:
    """llguidance's error for a grammar; None for a valid one."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=GRAMMAR_LIMITS)
    return messages[0] if is_error else None


def grammar_of(constraint: Constraint) -> str:
    """The constraint as a grammar for `LLMatcher`."""
    match constraint.kind:
        case "json_object":
            return _schema_grammar({"type": "object"}, lenient=False)
        case "json_schema":
            return _schema_grammar(json.loads(constraint.text), constraint.lenient)
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "lark":
            return LLMatcher.grammar_from_lark(constraint.text)


def _schema_grammar(schema: object, lenient: bool) -> str:
    overrides: Any = {"whitespace_pattern": JSON_WHITESPACE, **({"lenient": True} if lenient else {})}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)


def _without_listing(message: str) -> str:
    """llguidance's message without the excerpt of the grammar below it."""
    return "\n".join(line for line in message.splitlines() if "|" not in line[:8] and line.strip(" ^"))


def _place(schema: dict[str, Any], message: str, lenient: bool) -> str:
    """The JSON pointer of the innermost subschema with the same error; "#" for the whole schema.

    llguidance reports the error without its place, so each subschema is validated on its own, with the definitions of
    the whole schema, in at most `_MAX_TRIES` tries.
    """
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    tries, place = _MAX_TRIES, "#"
    parts = list(_parts(schema, place))
    while parts and tries:
        pointer, part = parts.pop(0)
        tries -= 1
        if isinstance(part, dict) and _message_about(_schema_grammar({**definitions, **part}, lenient)) == message:
            place, parts = pointer, list(_parts(part, pointer))
    return place


def _parts(schema: dict[str, Any], pointer: str) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema, each with its JSON pointer."""
    for key, value in sorted(schema.items(), key=lambda item: item[0] not in _DEFINITIONS):
        if key in _SUBSCHEMA and isinstance(value, dict):
            yield f"{pointer}/{key}", value
        elif key in _SUBSCHEMA_MAPS and isinstance(value, dict):
            yield from ((f"{pointer}/{key}/{name}", part) for name, part in value.items())
        elif key in _SUBSCHEMA_LISTS and isinstance(value, list):
            yield from ((f"{pointer}/{key}/{index}", part) for index, part in enumerate(value))
