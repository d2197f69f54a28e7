"""Reads a foreign worker's chat completion, whole or as a stream, into the events from which other APIs' answers are
written.
"""

from collections.abc import AsyncIterator, Mapping
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
        self._arguments: dict[int, list[str]] = {}  # of calls, by the worker's index, in the order of their beginnings
        self._heads: dict[int, tuple[str, str]] = {}
        self._open: int | None = None

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
        for index in list(self._arguments):
            self._begin_call(index)
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
        if reason := choice.get("finish_reason"):
            self.finish_reason = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
        stop = choice.get("stop_reason")  # where servers say which stop string has ended the answer
        if isinstance(stop, str) and stop in self._stops:
            self.stop_sequence = stop

    def _read_call(self, call: Json) -> None:
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments = function.get("name"), function.get("arguments")
        index = call.get("index")
        if type(index) is not int:  # some servers send each call whole, and do not number them
            index = len(self._heads) if name else len(self._heads) - 1
        if index not in self._heads:
            self._heads[index] = (str(name or ""), str(call.get("id") or "") or openai_call_id())
            self._arguments[index] = []
        text = arguments if isinstance(arguments, str) else ""
        if index not in self._arguments:
            return  # it has ended: text or reasoning came behind it
        if self._open is None:
            self._begin_call(index)
        if text:
            self._arguments[index].append(text)
            if index == self._open:
                self._add(CallArguments(self.calls - 1, text))

    def _begin_call(self, index: int) -> None:
        """Begin to pass on a call, with the arguments that it has already."""
        name, call_id = self._heads[index]
        self._open = index
        self.calls += 1
        self._add(CallBegin(self.calls - 1, name, call_id))
        if known := "".join(self._arguments[index]):
            self._add(CallArguments(self.calls - 1, known))

    def _end_call(self) -> None:
        if self._open is None:
            return
        arguments = "".join(self._arguments.pop(self._open))
        self._add(CallEnd(self.calls - 1, isinstance(decoded(arguments.encode() or b"{}"), dict)))
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
