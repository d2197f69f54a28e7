"""Deadlines for what workers send, in which time during which this process did not run does not count.

A process takes in nothing while its event loop is busy, or while it or the whole machine stands still. It would take
all workers for silent when it goes on, though their messages lie in its sockets.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

TICK_SECONDS = 0.25
"""Between two looks at the clock; what is left of it when a standstill begins counts as time in which the loop ran."""


class LoopClock:
    """The seconds of ``clock`` in which the event loop has run. Before `start` and after `stop`, all count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stood_still = 0.0
        self._due: float | None = None  # when the next look at the clock should be
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self) -> float:
        now = self._clock()
        return now - self._stood_still - self._late(now)

    def start(self) -> None:
        """Follow the running event loop."""
        now = self._clock()
        self._stood_still += self._late(now)
        self._due = now + TICK_SECONDS
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._stood_still += self._late(self._clock())
            self._timer.cancel()
            self._timer = self._due = None

    def _late(self, now: float) -> float:
        return 0.0 if self._due is None else max(0.0, now - self._due)


class ClockTimeout:
    """As `asyncio.timeout`, by any clock: TimeoutError after ``seconds`` of it; None: never."""

    def __init__(self, seconds: float | None, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = 0.0
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        if self._seconds is not None:
            self._began = self._clock()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._check, self._seconds)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, trace)

    def _check(self, seconds: float) -> None:
        left = seconds - (self._clock() - self._began)
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._check, seconds)
        else:
            self._scope.reschedule(0)
