"""A gateway's end of a request channel: requests to one worker, and their outputs, over one connection."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import count

from emberkv import errors
from emberkv.cluster import wire
from emberkv.engine.request import GenerationRequest, PrefillProgress, TokenOutput

Outcome = TokenOutput | wire.Failure | PrefillProgress


class RequestChannel:
    """Carries requests for as long as its connection lasts. Belongs to one event loop.

    `sent` gives what goes to the worker, and `take` is given what comes back. failed: the error that all requests end
    by once the connection has ended; None before.
    """

    def __init__(self) -> None:
        self.failed: errors.EmberError | None = None
        self._numbers = count()
        self._request_ids: dict[int, str] = {}
        self._inboxes: dict[int, _Inbox] = {}
        # the first bytes of its body are what a request's headers wait for
        self._frames = [wire.HEARTBEAT]
        self._has_frames = asyncio.Event()

    async def sent(self) -> AsyncGenerator[bytes, None]:
        """Frames, as they are to be sent."""
        while True:
            self._has_frames.clear()
            if not self._frames:
                await self._has_frames.wait()
            data = b"".join(self._frames)
            self._frames.clear()
            yield data

    def take(self, message: bytes) -> None:
        """Raises WireError for what is no message of a worker's."""
        for number, outcome in wire.decode_outputs(message, self._request_ids):
            self._inboxes[number].put(outcome)

    def end(self, error: errors.EmberError) -> None:
        """The connection has ended by ``error``, which all requests under way end by."""
        self.failed = error
        for inbox in self._inboxes.values():
            inbox.fail(error)

    async def outcomes(self, request: GenerationRequest) -> AsyncGenerator[Outcome, None]:
        """What comes of a request, to its last output, or the error of `end` behind what came before it. To close the
        generator earlier aborts the request.
        """
        number = next(self._numbers)
        self._send(wire.Submit(number, wire.encode_request(request)))
        inbox = self._inboxes[number] = _Inbox()
        self._request_ids[number] = request.request_id
        has_ended = False
        try:
            while not has_ended:
                for outcome in await inbox.take():
                    is_last = isinstance(outcome, TokenOutput) and outcome.finish_reason is not None
                    has_ended = is_last or isinstance(outcome, wire.Failure)
                    yield outcome
        finally:
            del self._inboxes[number], self._request_ids[number]
            if not has_ended and self.failed is None:
                self._send(wire.Abort(number))

    def _send(self, message: wire.Submit | wire.Abort) -> None:
        self._frames.append(wire.frame(wire.encode(message)))
        self._has_frames.set()


class _Inbox:
    """What has come of one request and was not taken yet."""

    def __init__(self) -> None:
        self._outcomes: list[Outcome] = []
        self._error: errors.EmberError | None = None
        self._has_news = asyncio.Event()

    def put(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._has_news.set()

    def fail(self, error: errors.EmberError) -> None:
        self._error = error
        self._has_news.set()

    async def take(self) -> list[Outcome]:
        """All that has come, as soon as there is anything. Raises the error behind it."""
        if not self._outcomes and self._error is None:
            self._has_news.clear()
            await self._has_news.wait()
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes
        assert self._error is not None
        raise self._error
