"""Carries the answers to one HTTP request from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import Engine, GenerationRequest, PrefillProgress, TokenOutput
from emberkv.errors import EmberError, EngineStoppedError
from emberkv.serving.answers.answer import Answer, AnswerDelta, AnswerState, PlacedLogprobs
from emberkv.serving.errors import GenerationFailedError
from emberkv.serving.metrics import AnswerTimer
from emberkv.serving.parsing.events import ParsedMessage


class OutputQueue:
    """Outputs on their way from the engine's thread to an event loop, which is woken once for a step's outputs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[Callable[[TokenOutput], None], TokenOutput]] = deque()
        self._wake_is_due = False

    def post(self, deliver: Callable[[TokenOutput], None], output: TokenOutput) -> None:
        """From any thread: have ``deliver(output)`` called on the loop."""
        self._waiting.append((deliver, output))
        if not self._wake_is_due:
            self._wake_is_due = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is no reader left
                self.loop.call_soon_threadsafe(self._deliver_all)

    def _deliver_all(self) -> None:
        self._wake_is_due = False  # before emptying, so that a later post wakes the loop again
        while self._waiting:
            deliver, output = self._waiting.popleft()
            deliver(output)


@dataclass(slots=True)
class _Slot:
    """An answer, its request in the engine, and the outputs that it has not absorbed yet."""

    request_id: str
    answer: Answer
    timer: AnswerTimer
    inbox: list[TokenOutput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A finished answer with all of its text. message: what the text means, where it is parsed."""

    answer: Answer
    text: str
    logprobs: tuple[PlacedLogprobs, ...]
    message: ParsedMessage = field(default_factory=ParsedMessage)


class WholeMessage(Protocol):
    """A finished answer that is parsed."""

    @property
    def answer(self) -> AnswerState: ...

    @property
    def message(self) -> ParsedMessage: ...


class MessageStream(Protocol):
    """Answers that are parsed while they are made: see `AnswerStream`."""

    @property
    def answers(self) -> Sequence[AnswerState]: ...

    async def started(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[AnswerDelta]: ...


def _raise_failure(output: TokenOutput) -> None:
    """Raises what an answer's last output says it failed by."""
    if output.refusal is not None:
        raise output.refusal
    if output.finish_reason is FinishReason.ERROR:
        raise GenerationFailedError(f"generation failed: {output.error}")
    if output.finish_reason is FinishReason.ABORT:
        raise EngineStoppedError("the engine stopped before the answer was finished")


class AnswerStream:
    """The answers to one HTTP request. Iterate once, inside ``async with``, which aborts what is unfinished.

    ``on_close`` is called before the iteration gives out the last part of the answers or raises: a client that has seen
    the end of its answer finds it counted, and may ask again within its limits. ``on_exit`` is called when the
    ``async with`` is left: the last part has been sent by then.

    Iterating raises EngineStoppedError when the engine or the server stops first, GenerationFailedError when
    the engine fails, and the error that the stream is interrupted with.

    clipped_to: the answers' ``max_tokens``, where the request asked for more than fit. history: see `Prompt`.
    has_ended: whether all answers have come to their ends, so that their usage is final. before_waiting: awaited
    whenever the iteration has given out all that there is.
    """

    def __init__(self, engine: Engine, on_close: Callable[["AnswerStream"], None]) -> None:
        self._engine = engine
        self._on_close = on_close
        self.on_exit: Callable[[], None] = lambda: None
        self.before_waiting: Callable[[], Awaitable[None]] | None = None
        self._slots: list[_Slot] = []
        self._due: deque[_Slot] = deque()
        self._has_output = asyncio.Event()
        self._interruption: EmberError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._closed = False
        self.clipped_to: int | None = None
        self.history: Mapping[str, int] = {}
        self.has_ended = False

    @property
    def timed_answers(self) -> list[tuple[str, Answer, AnswerTimer]]:
        """Each answer with its request's name in the engine."""
        return [(slot.request_id, slot.answer, slot.timer) for slot in self._slots]

    @property
    def answers(self) -> list[Answer]:
        """In the order of the prompts; their usage is final once the stream has ended."""
        return [slot.answer for slot in self._slots]

    def add(self, request: GenerationRequest, answer: Answer, timer: AnswerTimer, outputs: OutputQueue) -> None:
        """Submit one more request; raises what ``Engine.submit`` raises."""
        slot = _Slot(request.request_id, answer, timer)

        def deliver(output: TokenOutput) -> None:
            timer.record(output)
            slot.inbox.append(output)
            self._due.append(slot)
            self._has_output.set()

        self._engine.submit(request, lambda output: outputs.post(deliver, output))
        self._slots.append(slot)

    def interrupt(self, error: EmberError) -> None:
        """End the stream early: its iteration raises ``error``, unless it has given out the last part already."""
        if self._closed:
            return
        self._interruption = error
        self._has_output.set()

    def _raise_interruption(self) -> None:
        if self._interruption is not None:
            raise self._interruption

    def interrupt_after(self, seconds: float, error: EmberError) -> None:
        """Have `interrupt` called once ``seconds`` have passed, unless the stream is closed before."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.interrupt, error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnswerDelta:
        try:
            while True:
                self._raise_interruption()
                while self._due:
                    delta = self._absorb(self._due.popleft())
                    if delta is not None:
                        if self.has_ended:
                            self.close()
                        return delta
                if all(slot.answer.finish_reason for slot in self._slots):
                    raise StopAsyncIteration
                if self.before_waiting is not None:
                    await self.before_waiting()
                    if self._due or self._interruption is not None:  # they came meanwhile
                        continue
                self._has_output.clear()
                await self._has_output.wait()
        except BaseException:
            self.close()
            raise

    def _absorb(self, slot: _Slot) -> AnswerDelta | None:
        if not slot.inbox or slot.answer.finish_reason is not None:
            return None
        for output in slot.inbox:
            if output.refusal is not None:
                raise output.refusal
            slot.answer.absorb(output)
        last = slot.inbox[-1]
        slot.inbox.clear()
        answer = slot.answer
        if answer.ended_early:
            self._engine.abort(slot.request_id)
        if answer.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            _raise_failure(last)
        if answer.finish_reason is not None:
            self.has_ended = all(each.answer.finish_reason is not None for each in self._slots)
        return answer.take()

    async def started(self, within: float | None = None) -> bool:
        """Wait for the first output, from which on the first answer's cache usage is known, for ``within`` seconds;
        None: for as long as it takes. Returns whether it has come.

        Raises what iterating would raise, where that comes before any token.
        """
        first = self._slots[0]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not (first.inbox or first.answer.finish_reason or self._interruption):
                    self._has_output.clear()
                    await self._has_output.wait()
        self._raise_interruption()
        if first.inbox:
            output = first.inbox[0]
            if not output.token_ids:
                _raise_failure(output)
            first.answer.usage = output.usage or first.answer.usage
        return bool(first.inbox or first.answer.finish_reason)

    def progress(self) -> PrefillProgress | None:
        """How far the first answer's prompt is computed; None before it is admitted, and once the answer has ended."""
        return self._engine.progress(self._slots[0].request_id)

    async def collect(self) -> list[WholeAnswer]:
        """Wait for all answers."""
        texts: list[list[str]] = [[] for _ in self._slots]
        logprobs: list[list[PlacedLogprobs]] = [[] for _ in self._slots]
        async for delta in self:
            texts[delta.index].append(delta.text)
            logprobs[delta.index].extend(delta.logprobs)
        return [
            WholeAnswer(slot.answer, "".join(text), tuple(entries), slot.answer.message)
            for slot, text, entries in zip(self._slots, texts, logprobs, strict=True)
        ]

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for slot in self._slots:
            if slot.answer.finish_reason is None:
                self._engine.abort(slot.request_id)
            slot.timer.finished(slot.answer.finish_reason or FinishReason.ABORT)
        self._on_close(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.on_exit()
