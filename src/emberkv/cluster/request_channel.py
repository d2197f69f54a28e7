"""A gateway's end of a request channel: requests to one worker, and their outputs, over one connection."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from itertools import count

from msgspec import Raw

from emberkv import errors
from emberkv.cluster import wire
from emberkv.engine.request import GenerationRequest, PrefillProgress, TokenOutput

IDLE_SECONDS = 10.0

Outcome = TokenOutput | wire.Failure | PrefillProgress


class RequestChannel:
    """Carries requests for as long as its connection lasts. Belongs to one event loop.

    `frames` gives what is sent to the worker, and `receive` is called with what the worker sends. clock: seconds.
    idle_seconds: after which a heartbeat is sent where there is nothing else, so that no proxy gives the connection up.
    failed: the error that all requests end by once the connection has ended; None before. sending_since: when the bytes
    that are being sent were given out, by the clock; None while there are none.
    """

    def __init__(self, clock: Callable[[], float], *, idle_seconds: float = IDLE_SECONDS) -> None:
        self.failed: errors.EmberError | None = None
        self.sending_since: float | None = None
        self._clock = clock
        self._idle_seconds = idle_seconds
        self._numbers = count()
        self._inboxes: dict[int, _Inbox] = {}
        self._submits: dict[int, bytes] = {}
        # a request's headers are sent with the first bytes of its body
        self._frames = [wire.HEARTBEAT]
        self._has_frames = asyncio.Event()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """What is to be sent, as it comes."""
        while True:
            self._has_frames.clear()
            if not (self._frames or self._submits):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._idle_seconds):
                        await self._has_frames.wait()
            data = b"".join((*self._frames, *self._submits.values())) or wire.HEARTBEAT
            self._frames.clear()
            self._submits.clear()
            self.sending_since = self._clock()
            yield data
            self.sending_since = None

    def receive(self, message: bytes) -> None:
        """Raises WireError for what is no message of a worker's."""
        for number, data in wire.decode_outcomes(message):
            if (inbox := self._inboxes.get(number)) is not None:  # else it has been aborted
                inbox.put(data)

    def end(self, error: errors.EmberError) -> None:
        """The connection has ended by ``error``, which all requests under way end by. A second one changes nothing."""
        if self.failed is None:
            self.failed = error
            for inbox in self._inboxes.values():
                inbox.fail(error)

    async def outcomes(self, request: GenerationRequest) -> AsyncGenerator[Outcome, None]:
        """What comes of a request, to its last output, or the error of `end` behind what came before it. To close the
        generator earlier aborts the request.
        """
        number = next(self._numbers)
        self._submits[number] = _frame(wire.Submit(number, wire.encode_request(request)))
        self._has_frames.set()
        inbox = self._inboxes[number] = _Inbox()
        has_ended = False
        try:
            while not has_ended:
                for data in await inbox.get():
                    outcome = wire.decode_outcome(data, request.request_id)
                    is_last = isinstance(outcome, TokenOutput) and outcome.finish_reason is not None
                    has_ended = is_last or isinstance(outcome, wire.Failure)
                    yield outcome
        finally:
            del self._inboxes[number]
            if self._submits.pop(number, None) is None and not has_ended:
                self._frames.append(_frame(wire.Abort(number)))
                self._has_frames.set()


def _frame(message: wire.Submit | wire.Abort) -> bytes:
    return wire.frame(wire.encode(message))


class _Inbox:
    """What has come of one request and was not taken yet."""

    def __init__(self) -> None:
        self._outcomes: list[Raw] = []
        self._error: errors.EmberError | None = None
        self._has_news = asyncio.Event()

    def put(self, outcome: Raw) -> None:
        self._outcomes.append(outcome)
        self._has_news.set()

    def fail(self, error: errors.EmberError) -> None:
        self._error = error
        self._has_news.set()

    async def get(self) -> list[Raw]:
        """All that has come, as soon as there is anything. Raises the error behind it."""
        if not self._outcomes and self._error is None:
            self._has_news.clear()
            await self._has_news.wait()
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes
        assert self._error is not None
        raise self._error
