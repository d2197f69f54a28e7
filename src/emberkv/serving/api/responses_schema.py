"""Requests of the Responses API, and the chat requests that they amount to."""

import hmac
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from emberkv.errors import RequestError
from emberkv.serving.api.conversation import count_left_out, placeholder
from emberkv.serving.api.validation import RequestBody
from emberkv.serving.event_stream import compact_json

Json = dict[str, Any]

_UNSUPPORTED = (
    "background", "conversation", "function_call", "functions", "logprobs", "max_tool_calls", "prompt", "top_logprobs",
)  # fmt: skip
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_WITHOUT_EFFECT = ("client_metadata",)
"""Beside what chats take without an effect. Other unknown fields are counted as left out where the chat is checked."""

_ROLES = ("user", "system", "developer", "assistant")
_DIGEST_BYTES = 16


def sealed_thought(text: str, salt: bytes) -> str:
    """A thought as ``encrypted_content``, in which clients that keep no thoughts carry it back. It is signed with the
    tenant's salt, and not encrypted: it is the client's own conversation.

    >>> opened_thought(sealed_thought("Two lamps.", b"salt"), b"salt")
    'Two lamps.'
    """
    content = text.encode(errors="replace")
    return b64encode(_thought_digest(content, salt) + content).decode()


def opened_thought(sealed: str, salt: bytes) -> str | None:
    """The thought in ``encrypted_content``; None where this server did not write it for this tenant."""
    try:
        data = b64decode(sealed, validate=True)
    except ValueError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _thought_digest(content, salt)):
        return None
    return content.decode(errors="replace")


def _thought_digest(content: bytes, salt: bytes) -> bytes:
    return hmac.digest(b"emberkv-thought-2" + salt, content, "sha256")[:_DIGEST_BYTES]


class Reasoning(BaseModel):
    effort: str | None = None
    summary: str | None = None


class TextOptions(BaseModel):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(RequestBody):
    """The body of POST /v1/responses. Items are checked as they become messages."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None

    @property
    def wants_sealed_thoughts(self) -> bool:
        return "reasoning.encrypted_content" in (self.include or ())

    def check(self) -> None:
        """Raises RequestError for what is not supported."""
        self.refuse(*_UNSUPPORTED)
        if (n := (self.model_extra or {}).get("n")) not in (None, 1):
            raise RequestError(f"n is {n!r}; a response has one answer: leave it out", param="n")
        if "message.output_text.logprobs" in (self.include or ()):
            raise RequestError("include has message.output_text.logprobs, which is not supported", param="include")
        if self.truncation not in (None, "disabled"):
            raise RequestError(
                f"truncation is {self.truncation!r}; only 'disabled' is supported, as long prompts are refused",
                param="truncation",
            )

    def items(self) -> list[Json]:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def chat_body(self, items: Sequence[Json], salt: bytes, left_out: Counter[str]) -> bytes:
        """The chat request that asks for the same, with ``items`` as its conversation. left_out: is added to.

        Raises RequestError naming the item at fault.
        """
        messages = ChatMessages(salt, left_out)
        if self.instructions:
            messages.add({"role": "system", "content": self.instructions}, "instructions")
        for index, item in enumerate(items):
            messages.add(item, f"input[{index}]")
        if not messages.messages:
            raise RequestError("input has no message; it must have at least one", param="input")
        tools = [tool for each in self.tools or () if (tool := _chat_tool(each, left_out)) is not None]
        if not tools and self.tool_choice not in (None, "auto", "none"):
            raise RequestError(
                "tool_choice demands a tool call, and the request has no tools that are functions", param="tool_choice"
            )
        fields = {
            **{name: value for name, value in (self.model_extra or {}).items() if name not in _WITHOUT_EFFECT},
            "model": self.model,
            "messages": messages.messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": tools or None,
            "tool_choice": _chat_choice(self.tool_choice) if tools else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _chat_format(self.text.format) if self.text and self.text.format else None,
            "verbosity": self.text.verbosity if self.text else None,
        }
        return compact_json({name: value for name, value in fields.items() if value is not None}).encode()


class ChatMessages:
    """Items of a response's input and output as the messages of a chat.

    The items of one answer (thoughts, text and calls) are one message. left_out: counts what has no place in a chat.
    """

    def __init__(self, salt: bytes, left_out: Counter[str]) -> None:
        self.messages: list[Json] = []
        self._salt = salt
        self._left_out = left_out

    def add(self, item: Mapping[str, Any], place: str) -> None:
        """Raises RequestError for an item that cannot be understood."""
        kind = item.get("type") or "message"
        match kind:
            case "message":
                self._add_message(item, place)
            case "reasoning":
                if thought := self._thought(item, place):
                    answer = self._answer(("content", "tool_calls"))
                    before = answer.get("reasoning_content")
                    answer["reasoning_content"] = f"{before}\n{thought}" if before else thought
            case "function_call" | "custom_tool_call" | "local_shell_call":
                self._add_call(str(kind), item, place)
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                output = self._text(item.get("output"), f"{place}.output")
                self.messages.append({"role": "tool", "tool_call_id": _call_id(item, place), "content": output})
            case _:
                count_left_out(self._left_out, str(kind))

    def _add_message(self, item: Mapping[str, Any], place: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise RequestError(
                f"{place}.role is {role!r}; it must be one of {', '.join(_ROLES)}", param=f"{place}.role"
            )
        text = self._text(item.get("content"), f"{place}.content")
        if role == "assistant":
            self._answer(("content", "tool_calls"))["content"] = text
        else:
            self.messages.append({"role": role, "content": text})

    def _add_call(self, kind: str, item: Mapping[str, Any], place: str) -> None:
        name: object
        arguments: object
        if kind == "local_shell_call":
            name, arguments = "local_shell", compact_json(item.get("action") or {})
        elif kind == "custom_tool_call":
            name, arguments = item.get("name"), compact_json({"input": item.get("input", "")})
        else:
            name, arguments = item.get("name"), item.get("arguments", "{}")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise RequestError(f"{place} must have a name and arguments, both strings", param=place)
        call = {"id": _call_id(item, place), "type": "function", "function": {"name": name, "arguments": arguments}}
        self._answer(()).setdefault("tool_calls", []).append(call)

    def _answer(self, ended_by: Iterable[str]) -> Json:
        """The message of the answer that the last items belong to; a new one if it has one of ``ended_by``."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or any(last.get(name) for name in ended_by):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last

    def _thought(self, item: Mapping[str, Any], place: str) -> str:
        name = "content" if item.get("content") else "summary"
        text = self._text(item.get(name), f"{place}.{name}")
        sealed = item.get("encrypted_content")
        opened = opened_thought(sealed, self._salt) if isinstance(sealed, str) else None
        if opened is None and not text:
            count_left_out(self._left_out, "reasoning")
        return text if opened is None else opened

    def _text(self, content: object, place: str) -> str:
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise RequestError(f"{place} must be a string or a list of parts", param=place)
        return "\n".join(self._part(part, f"{place}[{index}]") for index, part in enumerate(content))

    def _part(self, part: object, place: str) -> str:
        if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str):
            raise RequestError(f"{place} must be an object with a type", param=place)
        if kind == "refusal":
            return str(part.get("refusal") or "")
        if kind in _TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{place}.text must be a string", param=f"{place}.text")
            return str(part["text"])
        count_left_out(self._left_out, kind)
        return placeholder(kind.removeprefix("input_"))


def _call_id(item: Mapping[str, Any], place: str) -> str:
    given = item.get("call_id") or item.get("id")
    if not isinstance(given, str):
        raise RequestError(f"{place}.call_id is {given!r}; it must be a string", param=f"{place}.call_id")
    return given


def _chat_tool(tool: Mapping[str, Any], left_out: Counter[str]) -> Json | None:
    """A tool as chats have it; None for one that this server cannot offer to the model, which is counted."""
    if tool.get("type") != "function":
        count_left_out(left_out, f"tool-{tool.get('type')}")
        return None
    named = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in named if tool.get(key) is not None}}


def _chat_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or not all(isinstance(each, Mapping) for each in allowed):
                raise RequestError("tool_choice.tools must be a list of objects", param="tool_choice")
            names = [each.get("name") for each in allowed if each.get("type") == "function"]
            tools = [{"type": "function", "function": {"name": name}} for name in names]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    raise RequestError(
        f"tool_choice.type is {choice.get('type')!r}; it must be 'function' or 'allowed_tools'", param="tool_choice"
    )


def _chat_format(given: Mapping[str, Any]) -> Json:
    kind = given.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(
            f"text.format.type is {kind!r}; it must be 'text', 'json_object' or 'json_schema'", param="text.format.type"
        )
    if kind != "json_schema":
        return dict(given)
    if given.get("schema") is None:
        raise RequestError("text.format.schema is missing; it is required", param="text.format.schema")
    named = ("name", "description", "schema", "strict")
    return {"type": "json_schema", "json_schema": {key: given[key] for key in named if given.get(key) is not None}}
