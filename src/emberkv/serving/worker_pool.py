"""Daemon threads for work that takes as long as a client's request makes it take."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from emberkv.serving.errors import OverloadedError

T = TypeVar("T")

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
