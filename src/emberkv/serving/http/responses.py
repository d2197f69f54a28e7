"""Sends answers over HTTP, whole or as server-sent events. Both end when the client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from emberkv.serving.answers.answer_stream import AnswerStream, WholeAnswer
from emberkv.serving.errors import CLIENT_GONE
from emberkv.serving.workers import WorkerPool

MANY_LOGPROBS = 2000  # from here on, writing them down would be felt by others on the event loop

T = TypeVar("T")


class ResponseWriter(Protocol):
    """Writes the answers to one request in an API's wire form: as server-sent events, or as one JSON object."""

    def events(self, stream: AnswerStream) -> AsyncGenerator[bytes, None]: ...

    def whole(self, answers: list[WholeAnswer]) -> dict[str, Any]: ...


def sse_event(data: object, name: str | None = None) -> bytes:
    """One event whose data is a JSON object."""
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {compact_json(data)}\n\n".encode()


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

    headers: called once the first answer has begun, from which on its cache usage is known.
    """

    media_type = "text/event-stream"

    def __init__(
        self, answers: AnswerStream, events: AsyncGenerator[bytes, None], headers: Callable[[], dict[str, str]]
    ) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._answers = answers
        self._events = events
        self._late_headers = headers
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answers:
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        late = self._late_headers() if await self._answers.started() else {}
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **late})
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def respond(
    request: Request,
    stream: AnswerStream,
    writer: ResponseWriter,
    headers: Callable[[], dict[str, str]],
    workers: WorkerPool,
    *,
    as_events: bool,
) -> Response:
    """Send events, or wait for all answers and write them whole. headers: called once they can be known.

    workers: write the answers with many log-probabilities.
    """
    if as_events:
        return EventStream(stream, writer.events(stream), headers)
    async with stream:
        answers = await unless_disconnected(request.receive, stream.collect())
    if answers is None:
        return Response(status_code=CLIENT_GONE)
    if sum(len(answer.logprobs) for answer in answers) > MANY_LOGPROBS:
        whole = await workers.run(partial(writer.whole, answers))
    else:
        whole = writer.whole(answers)
    return JSONResponse(whole, headers=headers())
