"""What is asked of a server beforehand: its model's name and how it cuts words into tokens."""

import asyncio
from typing import Any

import httpx
import pytest

from emberkv.bench import runner
from emberkv.errors import ConfigError
from tests.bench.fake_server import FAKE, Event, FakeServer, finish, piece, usage


async def ratio(server: FakeServer) -> float | None:
    async with server.client() as client:
        return await runner.tokens_per_word(client, FAKE, "nonce", server.clock)


async def name(transport: httpx.AsyncBaseTransport) -> str:
    async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
        return await runner.first_model(client)


def test_the_template_does_not_count_into_the_length_of_a_word() -> None:
    def script(body: dict[str, Any]) -> list[Event]:
        words = len(body["messages"][0]["content"].split())
        return [(0.1, piece("a", finish="length")), (0.0, usage(25 + 3 * words // 2, 1)), (0.0, "[DONE]")]

    assert asyncio.run(ratio(FakeServer(script))) == 1.5


def test_a_server_without_usage_leaves_the_length_of_a_word_unknown() -> None:
    events: list[Event] = [(0.1, finish()), (0.0, "[DONE]")]
    assert asyncio.run(ratio(FakeServer(lambda _: events))) is None


def test_a_server_that_cannot_answer_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="does not answer a plain request: AnswerError: HTTP 401: no key"):
        asyncio.run(ratio(FakeServer(lambda _: httpx.Response(401, text="no key"))))


def test_the_first_model_is_taken() -> None:
    async def first() -> str:
        async with FakeServer().client() as client:
            return await runner.first_model(client)

    assert asyncio.run(first()) == "fake"


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(404), "404"),
        (httpx.Response(200, text="<html>"), "must be the URL of a running OpenAI-compatible server"),
        (httpx.Response(200, json={"data": []}), "lists no model"),
    ],
)
def test_what_is_no_such_server_is_refused(response: httpx.Response, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asyncio.run(name(httpx.MockTransport(lambda _: response)))
