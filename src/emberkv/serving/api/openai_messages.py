"""Converts messages, tools and ``tool_choice`` of the OpenAI API to those of chat templates."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from emberkv.errors import RequestError
from emberkv.serving.api.conversation import Message, ToolChoice, count_left_out, placeholder
from emberkv.serving.api.validation import string_field
from emberkv.validation import shown

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_MAY_BE_NULL = ("assistant", "tool")
_LEFT_OUT = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "video",
    "file": "document",
}
"""Types of parts that a text model cannot read, and the words for them in placeholders."""


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages whose content is a string, for ``Tokenizer.render_chat``.

    Text parts are joined by line breaks; "developer" is shown as "system"; a tool call's arguments become an object, as
    templates expect. Raises RequestError naming the place of what cannot be used.
    """
    return MessageReader().messages(messages)


@dataclass(slots=True)
class MessageReader:
    """Converts messages to those of a chat template.

    left_out: counts of the parts that a text model cannot read, by type. Each is replaced by a short text, so that an
    image in the history does not end a conversation.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    _function_ids: dict[str, str] = field(default_factory=dict)
    """Generated ids of calls in the deprecated ``function_call`` form, by the function's name."""

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Convert a request's messages. Raises RequestError naming the place of an invalid value."""
        if not messages:
            raise RequestError("messages is empty; it must hold at least one message", param="messages")
        return [self._message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], place: str) -> Message:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            accepted = ", ".join(repr(known) for known in _ROLES)
            raise RequestError(f"{place}.role is {role!r}; it must be one of {accepted}", param=f"{place}.role")
        plain: Message = {"role": _ROLES[role]}
        is_missing = message.get("content") is None and plain["role"] in _MAY_BE_NULL
        thoughts: list[str] = []
        plain["content"] = "" if is_missing else self._text(message.get("content"), f"{place}.content", thoughts)
        if plain["role"] == "assistant":
            given = message.get("reasoning_content") or message.get("reasoning")
            thoughts += [given] if isinstance(given, str) else []
            plain |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
            calls = self._calls(message, place)
            plain |= {"tool_calls": calls} if calls else {}
        for name in ("name", "tool_call_id"):
            if isinstance(message.get(name), str):
                plain[name] = message[name]
        if role == "function":
            plain.setdefault("tool_call_id", self._function_ids.get(str(message.get("name")), ""))
        return plain

    def _text(self, content: object, place: str, thoughts: list[str]) -> str:
        """The text of a message. Its reasoning is appended to ``thoughts``."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise RequestError(f"{place} must be a string or a list of text parts", param=place)
        texts = [self._part(part, f"{place}[{index}]", thoughts) for index, part in enumerate(content)]
        return "\n".join(text for text in texts if text is not None)

    def _part(self, part: object, place: str, thoughts: list[str]) -> str | None:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict):
            if kind in ("text", "input_text", "output_text"):
                return string_field(part, "text", place)
            if kind == "refusal":
                return string_field(part, "refusal", place)
            if kind == "thinking":
                thoughts.append(_thinking(part, place))
                return None
            if isinstance(kind, str) and kind in _LEFT_OUT:
                count_left_out(self.left_out, kind)
                return placeholder(_LEFT_OUT[kind])
        raise RequestError(f"{place} has type {kind!r}; this server reads text, so it must be 'text'", param=place)

    def _calls(self, message: Mapping[str, Any], place: str) -> list[Message]:
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError(f"{place}.tool_calls must be a list", param=f"{place}.tool_calls")
        read = [_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
        former = message.get("function_call")
        if former is not None and not read:
            name = former.get("name") if isinstance(former, dict) else None
            call_id = self._function_ids[str(name)] = f"function_{len(self._function_ids)}"
            read = [_call({"id": call_id, "function": former}, f"{place}.function_call")]
        return read


def _call(call: object, place: str) -> Message:
    fields = call if isinstance(call, dict) else {}
    function = fields.get("custom") if fields.get("type") == "custom" else fields.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{place} must be an object with function.name and function.arguments", param=place)
    # a custom tool takes a text
    arguments = {"input": function.get("input")} if fields.get("type") == "custom" else _arguments(function, place)
    return {
        "id": fields.get("id"),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _arguments(function: Mapping[str, Any], place: str) -> dict[str, Any] | str:
    """The arguments as an object, or the text if it is no JSON object: agents send a model's invalid calls back."""
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    if not isinstance(arguments, str):
        at = f"{place}.function.arguments"
        raise RequestError(f"{at} must be a string of JSON", param=at)
    try:
        parsed = from_json(arguments or "{}")
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _thinking(part: Mapping[str, Any], place: str) -> str:
    """The text of a thinking part, which is a string or a list of text parts."""
    thinking = part.get("thinking")
    if not isinstance(thinking, list):
        return string_field(part, "thinking", place)
    return "\n".join(string_field(each, "text", place) for each in thinking if isinstance(each, dict))


def template_tools(tools: Iterable[Mapping[str, Any]], left_out: Counter[str]) -> list[Message]:
    """Tools in the form of chat templates, without ``cache_control``. Tools that are not functions are counted in
    left_out.

    Raises RequestError naming the place of an invalid tool.
    """
    functions = []
    for index, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function")
        if kind != "function":
            count_left_out(left_out, kind if isinstance(kind, str) else "")
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{index}] must have function.name (string)", param=f"tools[{index}]")
        functions.append({key: value for key, value in tool.items() if key != "cache_control"})
    return functions


def tool_choice_of(given: object, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> ToolChoice:
    """The `ToolChoice` of a request's ``tool_choice``. tools: in the form of chat templates.

    Raises RequestError for an invalid form, and for the name of an unknown tool.
    """
    match given:
        case None | "auto":
            return ToolChoice(parallel=parallel)
        case "none":
            return ToolChoice("none")
        case "required":
            choice = ToolChoice("required", parallel=parallel)
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            choice = ToolChoice("required", (name,), parallel=parallel)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)}}:
            choice = ToolChoice(mode, _allowed_names(allowed), parallel)
        case _:
            raise RequestError(
                f"tool_choice is {shown(given)}; it must be 'none', 'auto', 'required', a function's name as "
                '{"type": "function", "function": {"name": NAME}}, or allowed_tools',
                param="tool_choice",
            )
    known = {tool["function"]["name"] for tool in tools}
    unknown = next((name for name in choice.names if name not in known), None)
    if unknown is not None:
        raise RequestError(f"tool_choice names {shown(unknown)}, which is not among the tools", param="tool_choice")
    if not known:
        raise RequestError(f"tool_choice is {shown(given)}, and there are no tools to call", param="tool_choice")
    return choice


def _allowed_names(allowed: Sequence[object]) -> tuple[str, ...]:
    names = []
    for each in allowed:
        match each:
            case {"function": {"name": str(name)}} | {"name": str(name)}:
                names.append(name)
            case _:
                raise RequestError(
                    f"tool_choice.allowed_tools has {shown(each)}; it must be a function", param="tool_choice"
                )
    if not names:
        raise RequestError("tool_choice.allowed_tools.tools is empty; it must name a function", param="tool_choice")
    return tuple(names)
