"""What other threads want of the engine's thread: requests, aborts, commands, and to stop."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from emberkv.core.scheduler import Scheduler
from emberkv.engine.live_requests import Live
from emberkv.errors import DuplicateRequestError, EngineStoppedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Command:
    """Something to do between two steps. run: tells its own future how it went; drop: that it will never be done."""

    run: Callable[[Scheduler], None]
    drop: Callable[[], None]


@dataclass(slots=True)
class Mail:
    """What came in, in order of arrival."""

    arrived: list[Live] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.arrived or self.aborted or self.commands)


class Mailbox:
    """Takes mail from any thread, for one thread to collect. Nothing but its own lists is touched under its lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mail = Mail()
        self._ids: set[str] = set()
        self._stopping = False
        self._nudged = False

    def submit(self, live: Live) -> None:
        """Raises DuplicateRequestError or EngineStoppedError."""
        request_id = live.request.request_id
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("the engine is stopping; no request can begin")
            if request_id in self._ids:
                raise DuplicateRequestError(f"request id {request_id!r} is in flight already")
            self._ids.add(request_id)
            self._mail.arrived.append(live)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._ids:
                self._mail.aborted.append(request_id)
                self._changed.notify()

    def command(self, work: Callable[[Scheduler], T]) -> Future[T]:
        """Raises EngineStoppedError."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("the engine is stopping; nothing can be asked of it")
            self._mail.commands.append(
                Command(lambda scheduler: _carry_out(work, scheduler, future), lambda: _drop(future))
            )
            self._changed.notify()
        return future

    def forget(self, request_id: str) -> None:
        """The request has ended, and its id may be used again."""
        with self._changed:
            self._ids.discard(request_id)

    def nudge(self) -> None:
        """End the wait that `collect` is in, or else the next one."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more mail. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def collect(self, timeout: float | None) -> Mail | None:
        """What has come in, after a wait for mail or a nudge of at most ``timeout`` seconds, None being without end.

        None after `stop`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._mail or self._stopping or self._nudged, timeout)
            self._nudged = False
            if self._stopping:
                return None
            mail, self._mail = self._mail, Mail()
            return mail

    def close(self) -> Mail:
        """Take no more mail; what nobody has collected."""
        self.stop()
        mail, self._mail = self._mail, Mail()
        return mail


def _carry_out(work: Callable[[Scheduler], T], scheduler: Scheduler, future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work(scheduler)
    except Exception as error:  # noqa: BLE001 - whoever asked is told, and the engine goes on
        future.set_exception(error)
    else:
        future.set_result(result)


def _drop(future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(EngineStoppedError("the engine has stopped; it was not done"))
