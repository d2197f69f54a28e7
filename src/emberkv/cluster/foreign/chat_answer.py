"""Reads a foreign worker's chat completion, whole or as a stream, into the events from which other APIs' answers are
written.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from emberkv.cluster.foreign.answers import decoded, usage_of
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage
from emberkv.errors import ClusterError
from emberkv.serving.answers.answer import AnswerDelta
from emberkv.serving.answers.parsed_output import openai_call_id
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

_REASONING = ("reasoning_content", "reasoning")
"""Fields in which servers put the reasoning of a message or a delta."""

_BROKEN_OFF = ("abort", "error")
"""Values of ``finish_reason`` by which vLLM and SGLang end an answer that is not complete."""


@dataclass(slots=True)
class _GivenCall:
    """What has arrived of a tool call. has_ended: it was passed on whole."""

    name: str = ""
    call_id: str = ""
    arguments: list[str] = field(default_factory=list)
    has_ended: bool = False


class ChatAnswer:
    """The first choice of a chat completion: an `AnswerState`, and a `WholeMessage` once it has ended.

    prompt_tokens: what the prompt is assumed to have until the worker says it. stops: the request's stop strings.
    silent: the request wants no tokens.

    Of several tool calls, one is passed on as it comes, and the others once it has ended: servers may send them mixed,
    and the other APIs have them one after another.
    """

    def __init__(self, prompt_tokens: int, stops: tuple[str, ...] = (), *, silent: bool = False) -> None:
        self.usage = CacheUsage(prompt_tokens, 0)
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None
        self.calls = 0
        self.silent = silent
        self.error = ""
        self._stops = stops
        self._events: list[OutputEvent] = []
        self._builder = MessageBuilder()
        self._given: dict[int, _GivenCall] = {}  # by the worker's index, in the order of their beginnings
        self._open: _GivenCall | None = None

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
        for call in self._given.values():
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
        if self.silent:  # the worker was asked for the one token that it has to give
            self.finish_reason = FinishReason.LENGTH
            return
        given = part if isinstance(part, dict) else {}
        reasoning = next((text for name in _REASONING if isinstance(text := given.get(name), str) and text), "")
        content = given.get("content")
        if reasoning:
            self._end_call()
            self._add(ReasoningText(reasoning))
        if isinstance(content, str) and content:
            self._end_call()
            self._add(ContentText(content))
        listed = given.get("tool_calls")
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
        given = self._given.setdefault(index, _GivenCall())
        given.name = given.name or (name if isinstance(name, str) else "")
        given.call_id = given.call_id or str(call.get("id") or "")
        if given.has_ended:
            return  # text or reasoning came after it
        if isinstance(arguments, str) and arguments:
            given.arguments.append(arguments)
            if given is self._open:
                self._add(CallArguments(self.calls - 1, arguments))
        if self._open is None and given.name:  # the name may come in a later chunk than the id
            self._begin_call(given)

    def _unnumbered(self, call_id: object, name: object) -> int:
        """The index of a call without one: the last call's, unless a name comes with another id, or a second one
        without an id. Some servers give each chunk of a call an id of its own.
        """
        last = max(self._given, default=0)
        known = self._given.get(last, _GivenCall())
        is_same = bool(call_id) and call_id == known.call_id
        return last + (bool(name and known.name) and not is_same)

    def _begin_call(self, call: _GivenCall) -> None:
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
