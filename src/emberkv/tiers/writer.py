"""One thread that changes the tiers, in the order in which it was asked to, and a queue that is bounded in bytes."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Writer:
    """Runs calls one after another.

    max_bytes: what waiting calls may keep in memory. failed: told, on the writer's thread, of each call that raised.
    """

    def __init__(self, max_bytes: int, failed: Callable[[BaseException], None]) -> None:
        self._max_bytes = max_bytes
        self._failed = failed
        self._lock = threading.Lock()
        self._bytes = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emberkv-tier-writer")

    @property
    def queued_bytes(self) -> int:
        return self._bytes

    def put(self, size: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T] | None:
        """Queue a call that keeps ``size`` bytes until it has run; None where they do not fit, or after `close`."""
        with self._lock:
            if self._closed or self._bytes + size > self._max_bytes:
                return None
            self._bytes += size
            future = self._thread.submit(call, *args, **kwargs)
        future.add_done_callback(lambda done: self._ended(done, size))
        return future

    def flush(self, timeout: float) -> bool:
        """Wait until all that is queued now has run; whether it has within ``timeout`` seconds."""
        mark = self.put(0, bool)
        if mark is None:
            return True
        return _finished(mark, timeout)

    def close(self, timeout: float) -> bool:
        """Run what is queued for ``timeout`` seconds and drop the rest, cancelling its futures; whether all ran."""
        with self._lock:
            if self._closed:
                return True
            self._closed = True
            mark = self._thread.submit(bool)
        all_ran = _finished(mark, timeout)
        self._thread.shutdown(wait=all_ran, cancel_futures=True)
        return all_ran

    def _ended(self, future: "Future[T]", size: int) -> None:
        with self._lock:
            self._bytes -= size
        if not future.cancelled() and (error := future.exception()):
            logger.error("a change of the tiers failed", exc_info=error)
            self._failed(error)


def _finished(future: "Future[bool]", timeout: float) -> bool:
    try:
        future.result(timeout)
    except TimeoutError:
        return False
    return True
