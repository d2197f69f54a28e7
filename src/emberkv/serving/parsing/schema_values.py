"""Converts argument values in plain text to JSON, by the tool's schema."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_TYPE_NAMES: Mapping[type, str] = {
    dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


def as_json(value: object) -> str:
    """The JSON text of ``value``. Lone surrogates are escaped, so that the text can be encoded as UTF-8.

    Raises TypeError or ValueError for a value without JSON form.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def within_string(text: str) -> str:
    """``text`` as it is written between the quotes of a JSON string. Results of consecutive pieces can be joined."""
    return as_json(text)[1:-1]


class ParameterTypes:
    """The JSON types of each tool's parameters."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                schema = function.get("parameters")
                self._parameters[function["name"]] = schema if isinstance(schema, Mapping) else {}

    @property
    def names(self) -> frozenset[str]:
        """The tools' names."""
        return frozenset(self._parameters)

    def of(self, tool: str, parameter: str) -> frozenset[str]:
        """The parameter's types, such as "string" and "integer"; empty if the schema has none."""
        schema = self._parameters.get(tool, {})
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or parameter not in properties:
            return frozenset()
        return frozenset(_types(properties[parameter], schema, set()))


def _types(schema: object, root: Mapping[str, Any], followed: set[str]) -> set[str]:
    """The types that a schema allows. followed: the references followed so far; each is followed once."""
    if not isinstance(schema, Mapping):
        return set()
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in followed:
            return set()
        followed.add(reference)
        return _types(_referenced(reference, root), root, followed)
    declared = schema.get("type")
    types = {each for each in (declared if isinstance(declared, list) else [declared]) if isinstance(each, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in _listed(schema, key):
            types |= _types(choice, root, followed)
    if not types:
        values = [*_listed(schema, "enum"), *([schema["const"]] if "const" in schema else ())]
        types = {_TYPE_NAMES[type(value)] for value in values if type(value) in _TYPE_NAMES}
    return types | ({"null"} if schema.get("nullable") else set())


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    given = schema.get(key)
    return given if isinstance(given, list) else []


def _referenced(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def json_value(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter's value. text: as the model wrote it. types: the parameter's.

    JSON of one of the types is kept, and Python's True, False, None, dicts and lists are converted: templates that
    render values by ``str`` teach them to their models. Any other text becomes a string. If ``types`` is empty, any
    JSON is kept.
    """
    if types == {"string"}:
        return as_json(text)
    stripped = text.strip()
    candidate = _PYTHON_WORDS.get(stripped, stripped)
    try:
        value = json.loads(candidate, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return (_python_collection(stripped) if types & {"object", "array"} else None) or as_json(text)
    return candidate if not types or _accepts(types, value) else as_json(text)


def _python_collection(text: str) -> str | None:
    """The JSON text of a Python dict or list; None for anything else."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return as_json(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _no_number(name: str) -> None:
    raise ValueError(name)


def is_json_object(text: str) -> bool:
    """Whether ``text`` is a valid JSON object. NaN and Infinity are invalid."""
    try:
        return isinstance(json.loads(text, parse_constant=_no_number), dict)
    except (ValueError, RecursionError):
        return False


def _accepts(types: frozenset[str], value: object) -> bool:
    name = _TYPE_NAMES[type(value)]
    if name == "integer":
        return bool(types & {"integer", "number"})
    if name == "number":
        return "number" in types or ("integer" in types and isinstance(value, float) and value.is_integer())
    return name in types and name != "string"
