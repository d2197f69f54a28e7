"""What other threads want of the engine's thread: requests, aborts, commands, and to stop."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from emberkv.engine.active_requests import ActiveRequest
from emberkv.engine.commands import CacheControl, Command
from emberkv.errors import DuplicateRequestError, EngineStoppedError

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A command and the future of its answer, which its sender may cancel before it is carried out."""

    command: Command[Any]
    answer: "Future[Any]"

    def execute(self, control: CacheControl) -> None:
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            result = control.execute(self.command)
        except Exception as error:  # noqa: BLE001 - the sender gets it, and the engine goes on
            self.answer.set_exception(error)
        else:
            if isinstance(result, Future):
                result.add_done_callback(self._complete)
            else:
                self.answer.set_result(result)

    def _complete(self, result: "Future[Any]") -> None:
        error = result.exception()
        if error is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result.result())

    def drop(self) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(EngineStoppedError("the engine has stopped; the command was not carried out"))


@dataclass(slots=True)
class Mail:
    """What came in, in order of arrival."""

    arrived: list[ActiveRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    commands: list[PendingCommand] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.arrived or self.aborted or self.commands)


class Mailbox:
    """Takes mail from any thread, for one thread to collect. Nothing but its own lists is touched under its lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mail = Mail()
        self._active: dict[str, ActiveRequest] = {}
        self._stopping = False
        self._woken = False

    def submit(self, active: ActiveRequest) -> None:
        """Raises DuplicateRequestError or EngineStoppedError."""
        request_id = active.request.request_id
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("the engine is stopping; no request can begin")
            if request_id in self._active:
                raise DuplicateRequestError(f"request id {request_id!r} is in flight already")
            self._active[request_id] = active
            self._mail.arrived.append(active)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._active:
                self._mail.aborted.append(request_id)
                self._changed.notify()

    def command(self, command: Command[R]) -> "Future[R]":
        """Raises EngineStoppedError."""
        answer: Future[R] = Future()
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("the engine is stopping; no command can be carried out")
            self._mail.commands.append(PendingCommand(command, answer))
            self._changed.notify()
        return answer

    def forget(self, request_id: str) -> None:
        """The request has ended, and its id may be used again."""
        with self._changed:
            self._active.pop(request_id, None)

    def find(self, request_id: str) -> ActiveRequest | None:
        """The request in flight of this id, which changes on the engine's thread."""
        with self._changed:
            return self._active.get(request_id)

    def wake(self) -> None:
        """End the wait that `collect` is in, or else the next one."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more mail. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def collect(self, timeout: float | None) -> Mail | None:
        """What has come in, after waiting for mail or `wake`, for at most ``timeout`` seconds; None: for ever.

        None after `stop`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._mail or self._stopping or self._woken, timeout)
            self._woken = False
            if self._stopping:
                return None
            mail, self._mail = self._mail, Mail()
            return mail

    def close(self) -> Mail:
        """Take no more mail. Returns what has not been collected."""
        self.stop()
        mail, self._mail = self._mail, Mail()
        return mail
