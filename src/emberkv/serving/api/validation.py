"""Request bodies: from JSON bytes to a checked model, or to an error that names the field."""

import reprlib
from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from emberkv.errors import RequestError

Json = dict[str, Any]
"""A JSON object, decoded."""


def _as_integer(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_as_integer)]
"""An integer, or a number with a fraction of 0, as languages without integers write them."""


class RequestBody(BaseModel):
    """Base of all request bodies. Types are strict: "12" is not accepted as a number. Unknown fields are in
    ``model_extra``.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    def refuse(self, *fields: str) -> None:
        """Raises RequestError for a field that would change the answer in a way not supported here.

        Fields that are absent or empty do no harm and are accepted, and so are unknown fields that are not named here.
        """
        extra = self.model_extra or {}
        for field in fields:
            if extra.get(field):
                raise RequestError(f"{field} is not supported; leave it out", param=field)


Body = TypeVar("Body", bound=RequestBody)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Raises RequestError naming the first field at fault, what was given and what would be accepted."""
    try:
        return kind.model_validate_json(body.removeprefix(BOM_UTF8))
    except ValidationError as error:
        raise _refusal(error) from None


def is_anthropic(body: Json) -> bool:
    """Whether a body with messages is of Anthropic's API and not OpenAI's, by its system prompt or its tools.

    Without both, the two look alike and mean the same.
    """
    tools = body.get("tools")
    has_tools = isinstance(tools, list) and any(isinstance(tool, dict) and "input_schema" in tool for tool in tools)
    return has_tools or "system" in body


Query = TypeVar("Query", bound=BaseModel)


def parse_query(kind: type[Query], parameters: Mapping[str, str]) -> Query:
    """As `parse_body`, of a URL's query."""
    try:
        return kind.model_validate(dict(parameters))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    problems = error.errors(include_url=False, include_context=False)
    field = problems[0]["loc"][0] if problems[0]["loc"] else None
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    message = "; ".join(_describe(problem) for problem in same_field[:3])
    return RequestError(message, param=None if field is None else str(field))


_ALTERNATIVES = frozenset({"str", "list[str]", "list[dict[str,any]]"})
"""pydantic's names for the types that a field may have, which it puts in the path of the value at fault."""


def _describe(problem: ErrorDetails) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part not in _ALTERNATIVES)
    accepted = problem["msg"]
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {accepted.removeprefix('Invalid JSON: ')}"
    if problem["type"] == "missing":
        return f"{path} is missing; it is required"
    given = reprlib.repr(problem["input"])  # shortened, whatever its size
    return f"{path or 'the body'} is {given}: {accepted[:1].lower()}{accepted[1:]}"


def string_field(fields: Mapping[str, Any], name: str, place: str) -> str:
    """The string in ``fields[name]``. place: of ``fields`` in the request. Raises RequestError if it is no string."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{place}.{name} must be a string", param=f"{place}.{name}")
    return value


def plain_text(content: object, place: str) -> str:
    """A message's content as one string: a string, or a list of text parts joined by line breaks.

    Raises RequestError naming ``place`` for anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of text parts", param=place)
    return "\n".join(part_text(part, f"{place}[{index}]") for index, part in enumerate(content))


def part_text(part: object, place: str) -> str:
    """The text of one part of a message's content. Raises RequestError for any other type of part."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise RequestError(f"{place} has type {kind!r}; this server reads text, so it must be 'text'", param=place)
    return string_field(part, "text", place)
