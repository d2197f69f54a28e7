"""Worker threads, and the preparation of requests on them: parsing, rendering and tokenizing off the event loop."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.errors import OverloadedError
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.tenancy.tenants import Tenant

T = TypeVar("T")

DEFAULT_THREADS = 8
DEFAULT_WAITING = 1024
LARGE_BODY_BYTES = 20_000
"""From here on, parsing and tokenizing on the event loop would delay other requests noticeably."""


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


class RequestPreparer:
    """Parses, renders and tokenizes the requests to the model that ``lifecycle`` holds; large ones on ``workers``.

    rules: rewrite prompts before they are rendered.
    """

    def __init__(self, lifecycle: Lifecycle, workers: WorkerPool, rules: CanonicalRules | None = None) -> None:
        self.rules = rules
        self._lifecycle = lifecycle
        self._workers = workers

    async def prepare(self, work: Callable[[bytes, ServedModel], T], body: bytes, tenant: Tenant) -> T:
        """What ``work`` returns for a body, given the model as ``tenant`` sees it, or raises.

        Raises NotReadyError before the model is loaded, unless it is loaded on demand, and OverloadedError when too
        many large requests wait.
        """
        await self._lifecycle.ensure_model()
        return await self.run(partial(work, body, self._lifecycle.model().seen_by(tenant.name)), len(body))

    async def run(self, work: Callable[[], T], body_bytes: int | None = None) -> T:
        """What ``work`` on a body of this size returns or raises; None: of any size. Raises OverloadedError."""
        is_small = body_bytes is not None and body_bytes <= LARGE_BODY_BYTES
        return work() if is_small else await self._workers.run(work)
