"""Server-sent events: sent as they are made, with pings while there is nothing to send."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emberkv.engine.request import PrefillProgress
from emberkv.serving.answers.answer_stream import AnswerStream

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """Seconds. headers: how long the headers of a stream wait, at most, for the request to be admitted, so that a
    refusal still has its status; admission_check: how often it is asked whether it is. ping: the longest silence.
    """

    headers: float = 5.0
    admission_check: float = 0.5
    ping: float = 10.0


class EventWriter(Protocol):
    """Writes answers in an API's wire form.

    ping: an event that the API's clients pass over. progress: of the first answer's prompt, while it is computed.
    """

    def events(self, stream: AnswerStream) -> AsyncGenerator[bytes, None]: ...

    def ping(self, progress: PrefillProgress | None) -> bytes: ...


def sse_event(data: object, name: str | None = None) -> bytes:
    """One event whose data is a JSON object."""
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {compact_json(data)}\n\n".encode()


def sse_comments(lines: Mapping[str, str]) -> bytes:
    """Lines that clients of event streams pass over, as ``: name: value``; nothing for no lines."""
    return "".join(f": {name}: {value}\n\n" for name, value in lines.items()).encode()


def ping_comment(progress: PrefillProgress | None) -> bytes:
    """A ping for clients that know of no event for it: ``: ping: computed=4096;prompt=18827``."""
    shown = "" if progress is None else f"computed={progress.computed_tokens};prompt={progress.prompt_tokens}"
    return sse_comments({"ping": shown})


def compact_json(data: object) -> str:
    return json.dumps(data, separators=(",", ":"))


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Await ``work``. If the client goes first, cancel it, wait until it has cleaned up, and return None."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))
    return None if task.cancelled() else task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they are made. However it ends, the answers behind the events are closed.

    The headers are sent once the request is admitted, or ``times.headers`` seconds after it was begun. What ends the
    answers before that is raised, and gets the status of an error. account: what is known of the answers once they
    have ended, by name; it is sent in comments before the stream's last events. has_late_headers: the headers wait for
    the first token, and the account is among them, for clients that take no comments.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: AnswerStream,
        writer: EventWriter,
        headers: Mapping[str, str],
        account: Callable[[], Mapping[str, str]],
        times: StreamTimes,
        *,
        has_late_headers: bool = False,
    ) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._answers = answers
        self._writer = writer
        self._account = account
        self._times = times
        self._early_headers = headers
        self._has_late_headers = has_late_headers
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answers:
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        if self._has_late_headers:
            await self._answers.started()
        else:
            await self._until_admitted()
        early = self._account() if self._has_late_headers else {}
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **self._early_headers, **early})
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send_events(send)
        except _SendError as failed:
            raise failed.error from None

    async def _send_events(self, send: Send) -> None:
        """Those that come together in one message, the last of them with the stream's end."""
        has_account = self._has_late_headers
        made: list[bytes] = []
        async with (
            _Pings(self._times.ping, partial(self._send_ping, send)) as pings,
            aclosing(self._writer.events(self._answers)) as events,
        ):

            async def send_made() -> None:
                if made:
                    pings.postpone()
                    message = _body(b"".join(made))
                    made.clear()
                    try:
                        await send(message)
                    except Exception as error:
                        raise _SendError(error) from error

            self._answers.before_waiting = send_made
            async for event in events:
                if self._answers.has_ended and not has_account:
                    has_account = True
                    made.append(sse_comments(self._account()))
                made.append(event)
            await send({"type": "http.response.body", "body": b"".join(made), "more_body": False})

    async def _until_admitted(self) -> None:
        """Raises what ended the answers meanwhile."""
        deadline = asyncio.get_running_loop().time() + self._times.headers
        while not await self._answers.started(within=self._times.admission_check):
            if self._answers.progress() is not None or asyncio.get_running_loop().time() >= deadline:
                return

    async def _send_ping(self, send: Send) -> None:
        await send(_body(self._writer.ping(self._answers.progress())))


class _SendError(BaseException):
    """What ``send`` has raised, on its way through a writer, which makes any other failure an event of the stream."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


class _Pings:
    """Has ``send`` called whenever nothing has postponed it for ``seconds``. Costs a stream no task while it flows."""

    def __init__(self, seconds: float, send: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._send = send
        self._sending: asyncio.Task[None] | None = None
        self._last = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._due)

    def postpone(self) -> None:
        self._last = self._loop.time()

    def _due(self) -> None:
        left = self._last + self._seconds - self._loop.time()
        if left <= 0:
            if self._sending is None or self._sending.done():  # else the client does not read
                self._sending = self._loop.create_task(self._send())
            self.postpone()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._due)

    async def __aenter__(self) -> "_Pings":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait((self._sending,))
