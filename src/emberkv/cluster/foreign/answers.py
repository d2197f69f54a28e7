"""Parses the answers of foreign workers: usage, the first token of a stream, whether a stream is complete, and the
events of a chat completion from which other APIs' answers are written.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgspec

from emberkv.cluster.foreign.worker import ReportedUsage
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage
from emberkv.errors import ClusterError
from emberkv.serving.answers.answer import AnswerDelta, openai_call_id
from emberkv.serving.api.validation import Json
from emberkv.serving.errors import GenerationFailedError
from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    MessageBuilder,
    OutputEvent,
    ParsedMessage,
    ReasoningText,
)

_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")
_DONE = b"[DONE]"

OF_THE_CONNECTION = frozenset({
    "connection", "content-length", "content-encoding", "date", "keep-alive", "proxy-authenticate", "server", "te",
    "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""Response headers that belong to one connection and are not forwarded."""


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a worker's response that are forwarded to the client, byte for byte.

    aiohttp decodes headers as UTF-8, and Starlette encodes them as Latin-1.
    """
    return {
        name.lower(): value.encode("utf-8", "surrogateescape").decode("latin-1")
        for name, value in headers.items()
        if name.lower() not in OF_THE_CONNECTION
    }


def usage_of(answer: Any) -> ReportedUsage | None:
    """The usage in the JSON of an answer or a chunk, or None. llama.cpp may report cached tokens in ``timings``."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict) or not _is_count(usage.get("prompt_tokens")):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    timings = answer.get("timings")
    if cached is None and isinstance(timings, dict):
        cached = timings.get("cache_n")
    completion = usage.get("completion_tokens")
    return ReportedUsage(
        usage["prompt_tokens"],
        completion if _is_count(completion) else 0,
        min(cached, usage["prompt_tokens"]) if _is_count(cached) else None,
    )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def decoded(data: bytes) -> Any:
    """The decoded JSON; None for invalid JSON, and for JSON that is nested too deeply."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class AnswerEvents:
    """Parses one stream of server-sent events, which pass unchanged. Usage is removed if the client did not ask for it.

    keeps_usage: whether the client asked for usage. has_begun: whether a token has arrived. is_done: whether
    ``[DONE]`` has arrived. has_failed: whether an event was an error. finish_reason: of the choice that ended last, ""
    before any has ended. response_id: the answer's id, "" before it is known. parts: how many chunks had a part of an
    answer; each has one token or more. on_chunk: called with each chunk's JSON.
    """

    def __init__(self, *, keeps_usage: bool, on_chunk: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.usage: ReportedUsage | None = None
        self.has_begun = False
        self.is_done = False
        self.has_failed = False
        self.finish_reason = ""
        self.response_id = ""
        self.parts = 0
        self._keeps_usage = keeps_usage
        self._on_chunk = on_chunk
        self._begun: set[str] = set()  # choices, by their index
        self._ended: set[str] = set()
        self._rest = b""

    @property
    def is_whole(self) -> bool:
        """Whether the stream is complete if it ends here: each answer has a ``finish_reason``, or there was an error.

        Some servers do not send ``[DONE]``, and some send it after an answer that they have broken off.
        """
        has_ended = self.has_failed or (bool(self._begun) and self._begun == self._ended)
        return has_ended and (self.is_done or not self._rest.strip())

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that ``data`` completes, as they are sent to the client; ``[DONE]`` only of a complete stream."""
        self._rest += data
        while (end := _END_OF_EVENT.search(self._rest)) is not None:
            event, self._rest = self._rest[: end.end()], self._rest[end.end() :]
            if kept := self._take(event):
                yield kept

    def _take(self, event: bytes) -> bytes:
        lines = [line.removeprefix(b"data:").strip() for line in event.splitlines() if line.startswith(b"data:")]
        payload = b"\n".join(lines)
        if payload == _DONE:
            self.is_done = True
            return event if self.is_whole else b""
        chunk = decoded(payload) if payload else None
        if not isinstance(chunk, dict):
            return event
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        if chunk.get("error"):
            self.has_failed = True
            return event
        self.usage = usage_of(chunk) or self.usage
        self.response_id = self.response_id or str(chunk.get("id") or "")
        listed = chunk.get("choices")
        choices = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        for choice in choices:
            self._take_choice(choice)
        if "usage" not in chunk or self._keeps_usage:
            return event
        if not choices:
            return b""
        del chunk["usage"]
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index, reason = str(choice.get("index", 0)), choice.get("finish_reason")
        self._begun.add(index)
        if reason:
            self.finish_reason = str(reason)
            self._ended.add(index)
        has_content = _has_content(choice)
        self.parts += has_content
        self.has_begun = self.has_begun or bool(reason) or has_content


def as_stream(answer: dict[str, Any], *, keeps_usage: bool) -> bytes:
    """The events of a whole answer, for a client that has asked for a stream: one chunk, and ``[DONE]``."""
    choices = [_as_part(choice) for choice in answer["choices"]]
    chunk = {**answer, "choices": choices}
    if answer.get("object") == "chat.completion":
        chunk["object"] = "chat.completion.chunk"
    if not keeps_usage:
        chunk.pop("usage", None)
    return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: " + _DONE + b"\n\n"


def _as_part(choice: Any) -> Any:
    """A whole answer's choice as that of a chunk, whose tool calls are numbered."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return choice
    calls = message.get("tool_calls")
    objects = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    numbered = [{"index": index, **call} for index, call in enumerate(objects)]
    delta = {**message, "tool_calls": numbered} if numbered else message
    return {**{name: value for name, value in choice.items() if name != "message"}, "delta": delta}


def _has_content(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has more than the role with which an answer begins."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for name, value in delta.items() if name != "role")
    return bool(choice.get("text"))


_REASONING = ("reasoning_content", "reasoning")
"""Fields in which servers put the reasoning of a message or a delta."""

_BROKEN_OFF = ("abort", "error")
"""Values of ``finish_reason`` by which vLLM and SGLang end an answer that is not complete."""


@dataclass(slots=True)
class _PartialCall:
    """What has arrived of a tool call. has_ended: it was passed on whole."""

    name: str = ""
    call_id: str = ""
    arguments: list[str] = field(default_factory=list)
    has_ended: bool = False


class ChatAnswer:
    """The first choice of a chat completion: an `AnswerState`, and a `WholeMessage` once it has ended.

    prompt_tokens: what the prompt is assumed to have until the worker says it. stops: the request's stop strings.
    wants_no_tokens: the ``max_tokens`` of the request is 0.

    Of several tool calls, one is passed on as it comes, and the others once it has ended: servers may send them mixed,
    and the other APIs have them one after another.
    """

    def __init__(self, prompt_tokens: int, stops: tuple[str, ...] = (), *, wants_no_tokens: bool = False) -> None:
        self.usage = CacheUsage(prompt_tokens, 0)
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None
        self.calls = 0
        self.wants_no_tokens = wants_no_tokens
        self.error = ""
        self._stops = stops
        self._events: list[OutputEvent] = []
        self._builder = MessageBuilder()
        self._calls: dict[int, _PartialCall] = {}  # by the worker's index, in the order of their beginnings
        self._open: _PartialCall | None = None

    @property
    def answer(self) -> "ChatAnswer":
        return self

    @property
    def message(self) -> ParsedMessage:
        """The message up to now."""
        return self._builder.message()

    def take(self) -> tuple[OutputEvent, ...]:
        """The events since the last call."""
        taken = tuple(self._events)
        self._events.clear()
        return taken

    def read_whole(self, completion: Any) -> None:
        """Read a whole completion."""
        for choice in choices_of(completion)[:1]:
            self._read(choice, choice.get("message"))
        self._read_usage(completion)
        self.end()

    def read_chunk(self, chunk: Json) -> None:
        """Read a chunk of a stream."""
        if error := chunk.get("error"):
            message = error.get("message") if isinstance(error, Mapping) else error
            self.error = f"the worker failed: {message}"
        for choice in choices_of(chunk):
            if choice.get("index", 0) == 0:
                self._read(choice, choice.get("delta"))
        self._read_usage(chunk)

    def end(self) -> None:
        """Say that the answer has ended."""
        self._end_call()
        for call in self._calls.values():
            if not call.has_ended:
                self._begin_call(call)
                self._end_call()
        self.finish_reason = self.finish_reason or FinishReason.STOP

    def _read_usage(self, answer: Any) -> None:
        usage = usage_of(answer)
        if usage is None:
            return
        self.usage = CacheUsage(usage.prompt, usage.cached or 0)
        self.completion_tokens = usage.completion
        details = answer["usage"].get("completion_tokens_details")
        reasoning = details.get("reasoning_tokens") if isinstance(details, dict) else None
        self.reasoning_tokens = reasoning if type(reasoning) is int else 0

    def _read(self, choice: Json, part: Any) -> None:
        if self.wants_no_tokens:  # the worker was asked for the one token that it has to give
            self.finish_reason = FinishReason.LENGTH
            return
        fields = part if isinstance(part, dict) else {}
        reasoning = next((text for name in _REASONING if isinstance(text := fields.get(name), str) and text), "")
        content = fields.get("content")
        if reasoning:
            self._end_call()
            self._add(ReasoningText(reasoning))
        if isinstance(content, str) and content:
            self._end_call()
            self._add(ContentText(content))
        listed = fields.get("tool_calls")
        for call in listed if isinstance(listed, list) else ():
            if isinstance(call, dict):
                self._read_call(call)
        reason = choice.get("finish_reason")
        if reason in _BROKEN_OFF:
            self.error = f"the worker ended the answer with finish_reason {reason!r}"
        elif reason:
            self.finish_reason = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
        stop = choice.get("stop_reason")  # where servers say which stop string has ended the answer
        if isinstance(stop, str) and stop in self._stops:
            self.stop_sequence = stop

    def _read_call(self, call: Json) -> None:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = function.get("name"), function.get("arguments")
        index = call.get("index")
        if type(index) is not int:  # some servers do not number them
            index = self._unnumbered(call.get("id"), name)
        partial = self._calls.setdefault(index, _PartialCall())
        partial.name = partial.name or (name if isinstance(name, str) else "")
        partial.call_id = partial.call_id or str(call.get("id") or "")
        if partial.has_ended:
            return  # text or reasoning came after it
        if isinstance(arguments, str) and arguments:
            partial.arguments.append(arguments)
            if partial is self._open:
                self._add(CallArguments(self.calls - 1, arguments))
        if self._open is None and partial.name:  # the name may come in a later chunk than the id
            self._begin_call(partial)

    def _unnumbered(self, call_id: object, name: object) -> int:
        """The index of a call without one: the last call's, unless a name comes with another id, or a second one
        without an id. Some servers give each chunk of a call an id of its own.
        """
        last = max(self._calls, default=0)
        known = self._calls.get(last, _PartialCall())
        is_same = bool(call_id) and call_id == known.call_id
        return last + (bool(name and known.name) and not is_same)

    def _begin_call(self, call: _PartialCall) -> None:
        """Begin to pass on a call, with the arguments that it has already."""
        self._open = call
        self.calls += 1
        self._add(CallBegin(self.calls - 1, call.name, call.call_id or openai_call_id()))
        if known := "".join(call.arguments):
            self._add(CallArguments(self.calls - 1, known))

    def _end_call(self) -> None:
        if self._open is None:
            return
        arguments = "".join(self._open.arguments)
        self._add(CallEnd(self.calls - 1, isinstance(decoded(arguments.encode() or b"{}"), dict)))
        self._open.has_ended = True
        self._open = None

    def _add(self, event: OutputEvent) -> None:
        self._events.append(event)
        self._builder.add((event,))


def choices_of(answer: Any) -> list[Json]:
    """The choices of a completion or a chunk, whatever else it is."""
    listed = answer.get("choices") if isinstance(answer, dict) else None
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


class ChatStream:
    """A `MessageStream` of one `ChatAnswer`, whose chunks ``relayed`` has parsed whenever it yields.

    Iterating raises GenerationFailedError where the worker fails, and what interrupts the request.
    """

    def __init__(self, answer: ChatAnswer, relayed: AsyncIterator[bytes]) -> None:
        self.answers = (answer,)
        self._relayed = relayed

    async def started(self) -> bool:
        """The first token is there before the stream is made."""
        return True

    def __aiter__(self) -> AsyncIterator[AnswerDelta]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[AnswerDelta]:
        (answer,) = self.answers
        try:
            async for _ in self._relayed:
                if answer.error:
                    raise GenerationFailedError(answer.error)
                if events := answer.take():
                    yield AnswerDelta(0, "", (), None, events)
        except ClusterError as error:
            raise GenerationFailedError(str(error)) from error
        answer.end()
        yield AnswerDelta(0, "", (), answer.finish_reason, answer.take())
