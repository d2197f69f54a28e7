"""A client that leaves takes its request out of the engine, whatever it was waiting for."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from emberkv.serving.server import HttpServer
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client
from tests.waiting import DEADLINE, eventually

USER = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": USER, "n": 2},
    "/v1/completions": {"model": MODEL, "prompt": ["a", "b"]},
    "/v1/messages": {"model": MODEL, "messages": USER, "max_tokens": 10},
}


@contextmanager
def asking(server: HttpServer, path: str, *, stream: bool) -> Iterator[socket.socket]:
    """A connection whose request has been sent and whose response was not read."""
    address = urlsplit(server.url)
    request = httpx.Request("POST", server.url + path, json={**BODIES[path], "stream": stream})
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.content)}\r\n\r\n"
    with closing(socket.create_connection((address.hostname, address.port), timeout=DEADLINE)) as connection:
        connection.sendall(head.encode() + request.content)
        yield connection


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("pause_after", [0, 3], ids=["in-prefill", "in-decode"])
def test_disconnect_aborts(server: HttpServer, engine: FakeEngine, path: str, stream: bool, pause_after: int) -> None:
    engine.script = Script("Hello", pause_after=pause_after)
    requests = 1 if path == "/v1/messages" else 2
    with asking(server, path, stream=stream):
        eventually(lambda: engine.running == requests)
    eventually(lambda: engine.running == 0)
    assert len(engine.aborted) == requests
    api = path.removeprefix("/v1/").replace("/", "_")
    counted = f'emberkv_requests_finished_total{{api="{api}",reason="abort"}} {requests}.0'
    eventually(lambda: counted in httpx.get(f"{server.url}/metrics", timeout=DEADLINE).text)


def test_a_client_that_leaves_does_not_disturb_another(server: HttpServer, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=3)
    with asking(server, "/v1/messages", stream=True):
        eventually(lambda: engine.running == 1)
    eventually(lambda: engine.running == 0)
    engine.script = Script("Hello")
    response = httpx.post(f"{server.url}/v1/messages", json=BODIES["/v1/messages"], timeout=DEADLINE)
    assert response.json()["content"][0]["text"] == "Hello"


def test_a_client_that_leaves_while_it_sends_is_no_error(client: Client, engine: FakeEngine) -> None:
    sent: list[Any] = []
    pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(pieces)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/messages", "query_string": b""}
    asyncio.run(client.app({**scope, "headers": [(b"host", b"test")], "scheme": "http"}, receive, send))
    assert sent[0]["status"] == 499
    assert engine.submitted == []
