"""Apps and servers around a fake engine."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from emberkv.serving.app import create_app
from emberkv.serving.context import ServingSettings
from emberkv.serving.lifecycle import Lifecycle, LoadedModel
from emberkv.serving.server import HttpServer, bind_socket

from tests.serving.fakes import ByteTokenizer, FakeEngine

MODEL = "tiny"
DEADLINE = 20.0


def eventually(condition: Callable[[], object]) -> None:
    """Poll until the condition holds; fail at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


class Client:
    """Asks an app without a network, one request an event loop."""

    def __init__(self, app: FastAPI) -> None:
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


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.stop()


@pytest.fixture
def model(engine: FakeEngine) -> LoadedModel:
    return LoadedModel((MODEL, "alias"), 1_700_000_000, engine, ByteTokenizer())


@pytest.fixture
def lifecycle(model: LoadedModel) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.loaded(model)
    return lifecycle


@pytest.fixture
def client(lifecycle: Lifecycle) -> Client:
    return Client(create_app(lifecycle, wall_clock=lambda: 1_800_000_000.5))


@contextmanager
def serving(
    lifecycle: Lifecycle, settings: ServingSettings | None = None, *, drain_seconds: float = 5.0
) -> Iterator[HttpServer]:
    """A real server on a port of its own, in a thread."""
    server = HttpServer(
        create_app(lifecycle, settings), lifecycle, bind_socket(port=0), drain_seconds=drain_seconds
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield server
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


Serve = Callable[..., AbstractContextManager[HttpServer]]


@pytest.fixture
def server(lifecycle: Lifecycle) -> Iterator[HttpServer]:
    with serving(lifecycle) as server:
        yield server
