"""Apps and servers to put questions to."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp

from emberkv.serving.app import RouterFactory, ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import ConnectionLimits, HttpServer, bind_socket
from tests.waiting import DEADLINE, eventually

MODEL = "tiny"


class Client:
    """Asks an app without a network, one request an event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(ask())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, json: object = None, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, json=json, **arguments)


@contextmanager
def serving(
    lifecycle: Lifecycle,
    settings: ServingSettings | None = None,
    *,
    drain_seconds: float = 5.0,
    limits: ConnectionLimits | None = None,
    routers: Sequence[RouterFactory] = (),
) -> Iterator[HttpServer]:
    """A real server on a port of its own, in a thread."""
    app, bound = create_app(lifecycle, settings, routers=routers), bind_socket(port=0)
    server = HttpServer(app, lifecycle, bound, drain_seconds=drain_seconds, limits=limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield server
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def sse_blocks(response: httpx.Response) -> list[str]:
    """The events of a stream as text, without comments."""
    return [block for block in response.text.split("\n\n") if block and not block.startswith(":")]


def sse_comments(response: httpx.Response) -> dict[str, str]:
    """The comments of a stream's form ``: name: value``."""
    lines = [line for line in response.text.splitlines() if line.startswith(": ")]
    return dict(line.removeprefix(": ").split(": ", 1) for line in lines)


def openai_events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, whose last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in sse_blocks(response)]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def openai_error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def anthropic_error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    error: dict[str, Any] = body["error"]
    return error
