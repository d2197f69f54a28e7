"""Checks of settings and files with pydantic: a strict base for models, and what is wrong with a value in plain words.

Every setting, file and option that pydantic checks is reported in these words, which say what would work.
"""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

_SUGGESTIONS = {
    "int_parsing": "use a whole number",
    "int_type": "use a whole number",
    "int_from_float": "use a whole number",
    "int_parsing_size": "use a number with fewer digits",
    "float_parsing": "use a number",
    "float_type": "use a number",
    "finite_number": "use a finite number",
    "bool_parsing": "use true or false",
    "bool_type": "use true or false",
    "byte_size": "use a size such as 4GiB",
    "byte_size_unit": "use a size such as 4GiB",
    "greater_than": "use more than {gt}",
    "greater_than_equal": "use at least {ge}",
    "less_than": "use less than {lt}",
    "less_than_equal": "use at most {le}",
    "multiple_of": "use a multiple of {multiple_of}",
    "string_type": "use text, in quotes if it looks like a number",
    "string_unicode": "use text in UTF-8",
    "string_too_short": "use text that is not empty",
    "datetime_parsing": "use a date and a time",
    "datetime_from_date_parsing": "use a date and a time",
    "path_type": "use a path",
    "list_type": "use a list",
    "tuple_type": "use a list",
    "dict_type": "use keys with values",
    "model_type": "use keys with values",
    "model_attributes_type": "use keys with values",
    "mapping_type": "use keys with values",
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
    "missing": "it is required",
    "extra_forbidden": "it is unknown",
    "none_required": "leave it out",
}

_MOST_SHOWN = 80


class Strict(BaseModel):
    """Base of the models of files: no unknown keys, no silent conversions, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if unknown:
                raise ValueError(f"unknown: {', '.join(unknown)}; accepted: {', '.join(cls.model_fields)}")
        return data


def describe(error: ValidationError, *, hidden: Collection[str] = ()) -> str:
    """What is wrong with some data, in one line: the place of each value at fault, the value, and what would work.

    hidden: keys whose values, and all within them, are not repeated. For example ``port 'x': use a whole number``.
    """
    return "; ".join(_described(each, hidden) for each in error.errors(include_url=False))


def _described(detail: Mapping[str, Any], hidden: Collection[str]) -> str:
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    is_shown = _is_one_value(detail) and not any(part in hidden for part in detail["loc"])
    parts = [place, *([shown(detail["input"])] if is_shown else [])]
    return f"{' '.join(filter(None, parts))}: {in_plain_words(detail)}".removeprefix(": ")


def _is_one_value(detail: Mapping[str, Any]) -> bool:
    """Whether the input is the value at fault, and not what it is missing from or in the midst of."""
    return detail["type"] not in ("missing", "json_invalid") and not isinstance(detail["input"], (dict, list))


def in_plain_words(detail: Mapping[str, Any]) -> str:
    """What would work instead of a value, from an entry of ``ValidationError.errors()``: "use a whole number".

    A message that a validator of ours raised is given as it is.
    """
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"])).removeprefix("Value error, ")
    if kind in ("literal_error", "enum"):
        return f"use {str(context['expected']).replace(chr(39), '')}"
    if kind in _SUGGESTIONS:
        return _SUGGESTIONS[kind].format(**context)
    message: str = detail["msg"]
    return message[:1].lower() + message[1:].replace("Input should be", "use")


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for a name that resembles a known one, else nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """A value as a message repeats it: as Python writes it, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 4]}...{text[-1]}"
