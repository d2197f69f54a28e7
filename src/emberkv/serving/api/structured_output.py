"""The request fields for structured output, converted to constraints of the answer."""

import json
from collections.abc import Mapping
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from emberkv.engine.constraints import check_constraint
from emberkv.engine.request import Constraint
from emberkv.errors import RequestError, reason_of
from emberkv.validation import shown

STRUCTURED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""vLLM's request fields for structured output, which are accepted as alternatives to ``response_format``."""

_FORMATS = ("json", "regex", "choice", "grammar", "json_object")
_HARMLESS = frozenset({"disable_any_whitespace", "disable_additional_properties", "disable_fallback"})


def constraint_of_response_format(given: object, param: str = "response_format") -> Constraint | None:
    """The checked constraint for OpenAI's ``response_format``, the Responses API's ``text.format`` or Anthropic's
    ``output_config.format``; None for plain text.

    The schema is read from ``json_schema.schema`` or from ``schema``. It is enforced whether or not ``strict`` is set.

    Raises RequestError for another type, and for a schema that cannot be compiled.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} is {shown(given)}; it must be an object with a type", param=param)
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint("json_object")
        case "json_schema":
            nested = given.get("json_schema")
            owner, place = (nested, f"{param}.json_schema") if isinstance(nested, Mapping) else (given, param)
            if owner.get("schema") is None:
                raise RequestError(f"{place}.schema is missing; it is required", param=f"{place}.schema")
            return _json_schema(owner["schema"], f"{place}.schema")
        case other:
            raise RequestError(
                f"{param}.type is {shown(other)}; it must be 'text', 'json_object' or 'json_schema'",
                param=f"{param}.type",
            )


def constraint_of_body(body: Mapping[str, Any]) -> Constraint | None:
    """The checked constraint for ``response_format`` or one of `STRUCTURED_FIELDS`; None if the request has none.

    body: the request's fields by name.

    Raises RequestError for more than one of these fields, for an unsupported value, and for a constraint that cannot
    be compiled.
    """
    found = {"response_format": constraint_of_response_format(body.get("response_format"))}
    for name in STRUCTURED_FIELDS:
        value = body.get(name)
        if value is None:
            continue
        if name == "structured_outputs":
            found[name] = _structured_outputs(value)
        else:
            found[name] = _vllm_constraint(name.removeprefix("guided_"), value, name)
    asked = {name: constraint for name, constraint in found.items() if constraint is not None}
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} are both given; send one of them", param=list(asked)[1])
    return next(iter(asked.values()), None)


def _structured_outputs(given: object) -> Constraint | None:
    param = "structured_outputs"
    if not isinstance(given, Mapping):
        raise RequestError(f"{param} is {shown(given)}; it must be an object", param=param)
    asked = {name: value for name, value in given.items() if value not in (None, False) and name not in _HARMLESS}
    unknown = next((name for name in asked if name not in _FORMATS), None)
    if unknown is not None:
        raise RequestError(
            f"{param}.{unknown} is not supported; use one of {', '.join(_FORMATS)}", param=f"{param}.{unknown}"
        )
    if len(asked) != 1:
        raise RequestError(f"{param} has {len(asked)} formats; it must have one of {', '.join(_FORMATS)}", param=param)
    ((name, value),) = asked.items()
    return _vllm_constraint(name, value, f"{param}.{name}")


def _vllm_constraint(name: str, value: object, param: str) -> Constraint:
    match name:
        case "json_object":
            return Constraint("json_object")
        case "json":
            return _json_schema(value, param)
        case "choice":
            if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
                raise RequestError(f"{param} is {shown(value)}; it must be a list of strings", param=param)
            return check_constraint(Constraint("lark", f"start: {' | '.join(map(json.dumps, value))}"), param)
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    if name == "regex":
        return check_constraint(Constraint("regex", value), param)
    try:
        lark = any_to_lark(value)
    except Exception as error:  # the converter raises various errors for invalid text
        raise RequestError(f"{param} is neither Lark nor GBNF: {reason_of(error)}", param=param) from error
    return check_constraint(Constraint("lark", lark), param)


def _json_schema(schema: object, param: str) -> Constraint:
    """schema: an object, or its JSON text."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return check_constraint(Constraint("json_schema", text), param)
