"""Requests of the Responses API, and the equivalent chat completion requests; stored responses, which clients retrieve
or continue by ``previous_response_id``, bounded for each tenant.
"""

import hmac
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

from pydantic import BaseModel, Field

from emberkv.errors import RequestError
from emberkv.serving.api.conversation import count_left_out, placeholder
from emberkv.serving.api.validation import Integer, Json, RequestBody, string_field
from emberkv.serving.event_stream import compact_json

_UNSUPPORTED = (
    "background", "conversation", "function_call", "functions", "logprobs", "max_tool_calls", "prompt", "top_logprobs",
)  # fmt: skip
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_WITHOUT_EFFECT = ("client_metadata",)
"""Fields that are accepted and ignored, in addition to those that chat completions ignore. Other unknown fields are
counted as left out when the chat request is checked.
"""

_ROLES = ("user", "system", "developer", "assistant")
_DIGEST_BYTES = 16


def signed_reasoning(text: str, salt: bytes) -> str:
    """Reasoning text as ``encrypted_content``: base64 of an HMAC with the tenant's salt, and of the text.

    Clients that do not keep reasoning text send this field back in the next request. The text is signed and not
    encrypted, as it belongs to the client's own conversation.

    >>> verified_reasoning(signed_reasoning("Two lamps.", b"salt"), b"salt")
    'Two lamps.'
    """
    content = text.encode(errors="replace")
    return b64encode(_reasoning_digest(content, salt) + content).decode()


def verified_reasoning(signed: str, salt: bytes) -> str | None:
    """The reasoning text in ``encrypted_content``, or None if the signature is not that of the tenant's salt."""
    try:
        data = b64decode(signed, validate=True)
    except ValueError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _reasoning_digest(content, salt)):
        return None
    return content.decode(errors="replace")


def _reasoning_digest(content: bytes, salt: bytes) -> bytes:
    return hmac.digest(b"emberkv-thought-2" + salt, content, "sha256")[:_DIGEST_BYTES]


class PageQuery(BaseModel):
    """Which of a response's input items are returned. after: the id of the last item of the page before."""

    limit: int = Field(20, ge=1, le=100)
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class Reasoning(BaseModel):
    effort: str | None = None
    summary: str | None = None


class TextOptions(BaseModel):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(RequestBody):
    """The body of POST /v1/responses. `chat_body` checks the items of ``input`` and ``tools``."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Integer | None = Field(None, ge=1)
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
    def wants_encrypted_reasoning(self) -> bool:
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
        """The body of the equivalent chat completion request, as JSON, with ``items`` as its messages.

        salt: the tenant's, by which signed reasoning is verified. left_out: counts what has no place in a chat, by
        type; this call adds to it. Raises RequestError naming the invalid item.
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
    """Converts items of a response's input and output to chat messages.

    Consecutive items of one answer (reasoning, text and calls) become one assistant message. left_out: counts what has
    no place in a chat, by type.
    """

    def __init__(self, salt: bytes, left_out: Counter[str]) -> None:
        self.messages: list[Json] = []
        self._salt = salt
        self._left_out = left_out

    def add(self, item: Mapping[str, Any], place: str) -> None:
        """Add an item. place: of the item in the request, for errors. Raises RequestError for an invalid item."""
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
        """The assistant message to add to: the last message, or a new one if that has one of the fields ``ended_by``
        or is not an assistant's.
        """
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or any(last.get(name) for name in ended_by):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last

    def _thought(self, item: Mapping[str, Any], place: str) -> str:
        name = "content" if item.get("content") else "summary"
        text = self._text(item.get(name), f"{place}.{name}")
        signed = item.get("encrypted_content")
        verified = verified_reasoning(signed, self._salt) if isinstance(signed, str) else None
        if verified is None and not text:
            count_left_out(self._left_out, "reasoning")
        return text if verified is None else verified

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
            return string_field(part, "text", place)
        count_left_out(self._left_out, kind)
        return placeholder(kind.removeprefix("input_"))


def _call_id(item: Mapping[str, Any], place: str) -> str:
    given = item.get("call_id") or item.get("id")
    if not isinstance(given, str):
        raise RequestError(f"{place}.call_id is {given!r}; it must be a string", param=f"{place}.call_id")
    return given


def _chat_tool(tool: Mapping[str, Any], left_out: Counter[str]) -> Json | None:
    """A tool in the form of chat completions. A tool that is not a function is counted in left_out; then None."""
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


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the conversation up to its end.

    response: the JSON that was sent. conversation: the input items, including those of earlier responses, followed by
    the output items. input_items: how many of them are input. size: bytes of everything as JSON.
    """

    response: Mapping[str, Any]
    conversation: Sequence[Json]
    input_items: int
    size: int


@dataclass(slots=True)
class _Tenant:
    """ids: of the tenant's responses, the least recently used first. size: bytes of all of them."""

    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    size: int = 0


class ResponseStore:
    """The responses that were used last, until they have not been used for ``seconds``.

    most, most_bytes: bounds of each tenant's. total_bytes: of all tenants' together. Each response counts with the size
    of its whole conversation, although conversations share items. Methods may be called from any thread. clock:
    monotonic seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        most: int = 1000,
        most_bytes: int = 64 * 2**20,
        total_bytes: int = 512 * 2**20,
        seconds: float = 24 * 3600.0,
    ) -> None:
        self._clock = clock
        self._most = most
        self._most_bytes = min(most_bytes, total_bytes)
        self._total_bytes = total_bytes
        self._seconds = seconds
        self._size = 0
        self._stored: OrderedDict[tuple[str, str], tuple[StoredResponse, float]] = OrderedDict()
        """By tenant and id, the least recently used first, with the time of the last use."""
        self._tenants: dict[str, _Tenant] = {}
        self._changing = Lock()

    def put(self, tenant: str, response_id: str, stored: StoredResponse) -> None:
        """Store a response, and evict the least recently used ones until the bounds hold.

        A response that is larger than a tenant's bound is not stored and evicts nothing.
        """
        if stored.size > self._most_bytes:
            return
        with self._changing:
            self._expire()
            self._remove(tenant, response_id)
            own = self._tenants.setdefault(tenant, _Tenant())
            own.ids[response_id] = None
            self._stored[tenant, response_id] = stored, self._clock()
            own.size += stored.size
            self._size += stored.size
            while len(own.ids) > self._most or own.size > self._most_bytes:
                self._remove(tenant, next(iter(own.ids)))
            while self._size > self._total_bytes:
                self._remove(*next(iter(self._stored)))

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The response, which becomes the most recently used one, or None if it is not stored."""
        with self._changing:
            self._expire()
            found = self._stored.get((tenant, response_id))
            if found is None:
                return None
            self._stored[tenant, response_id] = found[0], self._clock()
            self._stored.move_to_end((tenant, response_id))
            self._tenants[tenant].ids.move_to_end(response_id)
            return found[0]

    def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a response. Returns whether it was stored."""
        with self._changing:
            return self._remove(tenant, response_id)

    def _remove(self, tenant: str, response_id: str) -> bool:
        found = self._stored.pop((tenant, response_id), None)
        if found is None:
            return False
        own = self._tenants[tenant]
        del own.ids[response_id]
        own.size -= found[0].size
        self._size -= found[0].size
        if not own.ids:
            del self._tenants[tenant]
        return True

    def _expire(self) -> None:
        before = self._clock() - self._seconds
        while self._stored:
            key, (_, used) = next(iter(self._stored.items()))
            if used >= before:
                break
            self._remove(*key)
