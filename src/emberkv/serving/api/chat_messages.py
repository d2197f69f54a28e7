"""OpenAI chat messages, made plain: what a chat template is shown."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from emberkv.errors import RequestError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a string, for ``Tokenizer.render_chat``.

    Text parts are joined by line breaks; "developer" is shown as "system"; a tool call's arguments become an
    object, as templates expect. Raises RequestError naming the place of what cannot be used.
    """
    if not messages:
        raise RequestError("messages is empty; it must hold at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        accepted = ", ".join(repr(known) for known in _ROLES)
        raise RequestError(f"{place}.role is {role!r}; it must be one of {accepted}", param=f"{place}.role")
    calls = message.get("tool_calls")
    plain: dict[str, Any] = {"role": _ROLES[role]}
    if message.get("content") is None and role == "assistant" and calls:
        plain["content"] = ""
    else:
        plain["content"] = plain_text(message.get("content"), f"{place}.content")
    if calls:
        if not isinstance(calls, list):
            raise RequestError(f"{place}.tool_calls must be a list", param=f"{place}.tool_calls")
        plain["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            plain[name] = message[name]
    return plain


def plain_text(content: object, place: str) -> str:
    """A message's content as one string: a string, or a list of text parts joined by line breaks."""
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
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{place}.text must be a string", param=f"{place}.text")
    return text


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{place} must be an object with function.name and function.arguments", param=place)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments or "{}")
        except ValueError as error:
            raise RequestError(
                f"{place}.function.arguments is not valid JSON: {error}", param=f"{place}.function.arguments"
            ) from error
    plain_function = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": plain_function}
