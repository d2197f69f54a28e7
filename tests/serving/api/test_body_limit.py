"""How large a body may be, declared or not."""

from typing import Any

import pytest
from fastapi import FastAPI

from emberkv.serving.app import create_app
from emberkv.serving.context import ServingSettings
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.fakes import FakeEngine
from tests.serving.harness import MODEL, Client, anthropic_error, openai_error

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
