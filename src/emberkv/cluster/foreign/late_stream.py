"""A stream that a worker has not begun yet: its client gets headers and pings meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from emberkv.cluster.foreign.answers import decoded
from emberkv.serving.api.openai_api import DONE
from emberkv.serving.errors import HttpFailure, anthropic_error, failure_mid_stream, openai_error
from emberkv.serving.event_stream import StreamTimes, ping_comment, sse_comments, sse_event, unless_disconnected

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class LateStream(Response):
    """Sends the response that ``begin`` makes, which is a stream's unless no worker has begun one.

    What comes within ``times.headers`` seconds is sent as it is, and errors that are raised until then get their
    status. After that, the headers of a stream are sent, and a ping every ``times.ping`` seconds; a response that is no
    stream, or an error, then becomes the last event. on_end: called after the response, in any case.
    """

    def __init__(
        self,
        begin: Callable[[], Coroutine[Any, Any, Response]],
        api: str,
        times: StreamTimes,
        on_end: Callable[[], None],
    ) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._begin = begin
        self._api = api
        self._times = times
        self._on_end = on_end
        self._is_late = False
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await unless_disconnected(receive, self._begun(send))
            if response is not None:
                await response(scope, receive, _Continued(send, self._api) if self._is_late else send)
        except Exception as error:
            if not self._is_late:
                raise  # it still gets its status
            await _send_last(send, error_event(self._api, failure_mid_stream(error)))
        finally:
            self._on_end()

    async def _begun(self, send: Send) -> Response:
        task = asyncio.create_task(self._begin())
        try:
            if not (await asyncio.wait({task}, timeout=self._times.headers))[0]:
                self._is_late = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                while not (await asyncio.wait({task}, timeout=self._times.ping))[0]:
                    await send(_part(_ping(self._api)))
            return await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                raise
            return task.result()  # it was made while the client went, and releases what it holds when it is sent
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


class _Continued:
    """Sends a response into a stream whose headers are sent: a stream's events as they are, anything else as an error
    event. Headers that say what emberkv did become comments.
    """

    def __init__(self, send: Send, api: str) -> None:
        self._send = send
        self._api = api
        self._status = 200
        self._is_stream = False
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            self._status = message["status"]
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
            about = {name: value for name, value in headers.items() if name.startswith("x-emberkv-")}
            if about:
                await self._send(_part(sse_comments(about)))
        elif self._is_stream:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await _send_last(self._send, error_event(self._api, self._failure()))

    def _failure(self) -> HttpFailure:
        answer = decoded(self._body)
        error = answer.get("error") if isinstance(answer, dict) else None
        said = error.get("message") if isinstance(error, dict) else error
        return HttpFailure(max(self._status, 400), str(said or f"the worker answers with status {self._status}"))


def error_event(api: str, failure: HttpFailure) -> bytes:
    """The last event of a stream of ``api`` that fails before its first token."""
    if api == "messages":
        return sse_event(anthropic_error(failure), "error")
    if api == "responses":
        error = {"code": failure.code or "server_error", "message": failure.message, "param": failure.param}
        return sse_event({"type": "error", **error, "sequence_number": 0}, "error")
    return sse_event(openai_error(failure)) + DONE


def _ping(api: str) -> bytes:
    return sse_event({"type": "ping"}, "ping") if api == "messages" else ping_comment(None)


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _send_last(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": False})
