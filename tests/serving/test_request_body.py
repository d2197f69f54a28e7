"""How large a body may be, declared or not."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI

from emberkv.errors import EmberError
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.errors import BodyTooLargeError, NotReadyError
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.middleware import ENDLESS_BODY, BodyLimit, default_max_bytes
from tests.serving.fakes import FakeEngine
from tests.serving.harness import MODEL, Client, anthropic_error, openai_error
from tests.waiting import on_a_loop

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
MESSAGE = {**CHAT, "max_tokens": 10}


@pytest.fixture
def small(lifecycle: Lifecycle) -> FastAPI:
    return create_app(lifecycle, ServingSettings(max_body_bytes=1000))


def test_an_oversize_body_is_refused(small: FastAPI, engine: FakeEngine) -> None:
    big = {"filler": "x" * 1000}
    response = Client(small).post("/v1/chat/completions", {**CHAT, **big})
    assert response.status_code == 413
    assert openai_error(response)["code"] == "request_too_large"
    assert "at most 1000 are accepted" in openai_error(response)["message"]
    response = Client(small).post("/v1/messages", {**MESSAGE, **big})
    assert response.status_code == 413
    assert anthropic_error(response)["type"] == "request_too_large"
    assert engine.submitted == []


def test_a_body_is_counted_even_without_a_declared_length(small: FastAPI) -> None:
    async def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 100

    response = Client(small).post("/v1/chat/completions", content=pieces())
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert "the request's body has 1100 bytes or more" in openai_error(response)["message"]


def test_a_body_at_the_limit_is_read(lifecycle: Lifecycle) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}]}'
    app = create_app(lifecycle, ServingSettings(max_body_bytes=len(body)))
    assert Client(app).post("/v1/chat/completions", content=body).status_code == 200
    assert Client(app).post("/v1/chat/completions", content=body + b" ").status_code == 413


@pytest.mark.parametrize(("declared", "status"), [("0" * 5000 + "9999", 413), ("9" * 5000, 413), ("0" * 5000, 400)])
def test_a_declared_length_of_any_number_of_digits(small: FastAPI, declared: str, status: int) -> None:
    response = Client(small).post("/v1/completions", content=b"", headers={"content-length": declared})
    assert response.status_code == status
    assert openai_error(response)["type"] == "invalid_request_error"


def test_by_default_a_body_holds_the_context_several_times(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    assert [default_max_bytes(tokens) for tokens in (4096, 2**18, 2**20)] == [16 * 2**20, 16 * 2**20, 64 * 2**20]
    engine.context_length = 2**19
    app = create_app(lifecycle)
    response = Client(app).post("/v1/completions", content=b"", headers={"content-length": str(2**25 + 1)})
    assert "at most 33554432 are accepted" in openai_error(response)["message"]


def test_unfinished_bodies_together_are_limited_and_small_ones_still_arrive() -> None:
    """Twenty bodies of which each brings its first 1,000 bytes and then waits, where 1,000 bytes are the most."""
    arriving = asyncio.Event()
    refused: list[EmberError] = []
    read: list[int] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        try:
            first = await receive()
            await receive()
            read.append(len(first["body"]))
        except EmberError as error:
            refused.append(error)

    async def nobody(_message: Any) -> None:
        return None

    async def ask(limit: BodyLimit, size: int) -> None:
        pieces = [{"body": b"x" * size, "more_body": True}, {"body": b"", "more_body": False}]

        async def receive() -> Any:
            if len(pieces) == 1:
                await arriving.wait()
            return pieces.pop(0)

        await limit({"type": "http", "headers": []}, receive, nobody)

    async def all_at_once() -> None:
        limit = BodyLimit(app, lambda: 1000)
        large = [asyncio.create_task(ask(limit, 1000)) for _ in range(20)]
        await asyncio.sleep(0)
        small = asyncio.create_task(ask(limit, 10))
        await asyncio.sleep(0)
        assert len(refused) == 4
        arriving.set()
        await asyncio.gather(*large, small)
        await ask(limit, 1000)  # those before have ended

    asyncio.run(all_at_once())
    assert (sum(read), read.count(10), read[-1]) == (16_010, 1, 1000)  # one large body made room for the small one
    assert all(isinstance(error, NotReadyError) for error in refused)


@on_a_loop
async def test_a_body_that_a_handler_takes_as_messages_has_no_limit_as_a_whole() -> None:
    read: list[int] = []

    async def app(scope: Any, receive: Any, _send: Any) -> None:
        scope[ENDLESS_BODY] = scope["path"] == "/endless"
        for _ in range(3):
            read.append(len((await receive())["body"]))

    async def receive() -> Any:
        return {"body": b"x" * 600, "more_body": True}

    limit = BodyLimit(app, lambda: 1000)
    await limit({"type": "http", "path": "/endless", "headers": []}, receive, receive)
    assert read == [600, 600, 600]
    with pytest.raises(BodyTooLargeError):
        await limit({"type": "http", "path": "/whole", "headers": []}, receive, receive)
    assert len(read) == 4
