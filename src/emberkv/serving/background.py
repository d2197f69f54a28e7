"""Threads for work off the event loop, and work beside the requests, whose end or failure metrics and /ready show."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.serving.errors import OverloadedError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class BackgroundWork:
    """One activity. failures: how often a part of it failed and was left out. running: False once it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0
        self.running = True

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A part of the work. If it raises, that is counted, logged (the first time, the second, the fourth, ...), and
        the work goes on with the next part: requests do not depend on it.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - counted, and shown in /ready and /metrics
            self.failures += 1
            if self.failures & (self.failures - 1) == 0:
                _log.error("%s failed, %d times by now; it goes on", self.name, self.failures, exc_info=error)

    def guarded(self, observer: Callable[[T], None]) -> Callable[[T], None]:
        """The same observer, each call of which is an `attempt`."""

        def observe(update: T) -> None:
            with self.attempt():
                observer(update)

        return observe

    def ended(self, why: str) -> None:
        """It cannot go on."""
        self.running = False
        _log.error("%s has ended: %s", self.name, why)


class Background(Collector):
    """All background work of a server, by name; a collector of its metrics."""

    def __init__(self) -> None:
        self._works: dict[str, BackgroundWork] = {}

    def work(self, name: str) -> BackgroundWork:
        return self._works.setdefault(name, BackgroundWork(name))

    def as_json(self) -> dict[str, dict[str, object]]:
        return {work.name: {"running": work.running, "failures": work.failures} for work in self._all()}

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("emberkv_background_running", "1 until the work has ended early.", labels=["work"])
        failures = CounterMetricFamily(
            "emberkv_background_failures", "Parts of the work that failed and were left out.", labels=["work"]
        )
        for work in self._all():
            running.add_metric([work.name], work.running)
            failures.add_metric([work.name], work.failures)
        yield from (running, failures)

    def _all(self) -> list[BackgroundWork]:
        return list(self._works.values())


DEFAULT_THREADS = 8
DEFAULT_WAITING = 1024


class WorkerPool:
    """Runs work off the event loop. Unlike asyncio's own threads, these do not keep the process from exiting.

    threads: as many run at most; each starts when it is first needed. waiting: how much work may wait for them.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, waiting: int = DEFAULT_WAITING) -> None:
        self._max_threads = threads
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(waiting)

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises. If the caller is cancelled, work that has not begun is not done.

        Call from one event loop's thread. Raises OverloadedError.
        """
        future: Future[T] = Future()
        try:
            self._queue.put_nowait(lambda: _carry_out(work, future))
        except queue.Full as error:
            raise OverloadedError("too many requests wait to be prepared; send it again later") from error
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_threads:
            thread = threading.Thread(target=self._work, name=f"emberkv-worker-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            self._queue.get()()
            self._idle.release()


def _carry_out(work: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - carried over to the caller
        future.set_exception(error)
    else:
        future.set_result(result)
