"""Bytes of streams: headers at admission, pings while there is nothing to send, and the cache's account at the end."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from emberkv.core.sequence import FinishReason
from emberkv.serving.app import ServingSettings
from emberkv.serving.event_stream import StreamTimes
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.server import HttpServer
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, serving
from tests.waiting import DEADLINE, eventually

USER = [{"role": "user", "content": "Hi"}]
CHAT, MESSAGES, COMPLETIONS = "/v1/chat/completions", "/v1/messages", "/v1/completions"
RESPONSES = "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": USER, "stream": True, "stream_options": {"include_usage": True}},
    MESSAGES: {"model": MODEL, "messages": USER, "max_tokens": 50, "stream": True},
    COMPLETIONS: {"model": MODEL, "prompt": "Once", "stream": True},
}
OF_RESPONSES = {"model": MODEL, "input": "Hi", "stream": True}
QUICK = StreamTimes(headers=3600.0, admission_check=0.01, ping=0.02)
PINGS = {
    CHAT: ": ping: computed=9;prompt=19",
    COMPLETIONS: ": ping: computed=2;prompt=5",
    MESSAGES: 'data: {"type":"ping","prefill":{"computed_tokens":9,"prompt_tokens":19}}',
}


@pytest.fixture
def paused(lifecycle: Lifecycle, engine: FakeEngine) -> Iterator[HttpServer]:
    """A server that pings often, whose engine computes a prompt until ``engine.resume``."""
    engine.script = Script("Hello", pause_after=0, cached=8)
    with serving(lifecycle, ServingSettings(stream_times=QUICK)) as server:
        yield server


@contextmanager
def streamed(server: HttpServer, path: str) -> Iterator[tuple[httpx.Response, Iterator[str]]]:
    with httpx.stream("POST", server.url + path, json=BODIES.get(path, OF_RESPONSES), timeout=DEADLINE) as response:
        yield response, response.iter_lines()


@pytest.mark.parametrize("path", BODIES)
def test_while_the_prompt_is_computed_pings_say_how_far(paused: HttpServer, engine: FakeEngine, path: str) -> None:
    with streamed(paused, path) as (response, lines):
        assert response.status_code == 200
        seen = [next(line for line in lines if line == PINGS[path]) for _ in range(3)]
        assert len(seen) == 3
        engine.resume()
        rest = list(lines)
    account = rest.index(": x-emberkv-cache: hit=8;pool=8;miss=" + ("11" if path != COMPLETIONS else "-3"))
    assert account < len(rest) - 2, "a client may stop reading at the last event"


def test_an_answer_that_pauses_is_pinged(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=2)
    with serving(lifecycle, ServingSettings(stream_times=QUICK)) as server, streamed(server, CHAT) as (_, lines):
        assert next(line for line in lines if line == ": ping: computed=19;prompt=19")
        engine.resume()
        assert list(lines)[-2] == "data: [DONE]"


def test_the_account_is_of_the_model_that_answered(
    lifecycle: Lifecycle, model: ServedModel, engine: FakeEngine
) -> None:
    engine.script = Script("Hello", pause_after=2)
    lifecycle.loaded(replace(model, headers=lambda _: {"x-emberkv-route": "first"}))
    with serving(lifecycle, ServingSettings(stream_times=QUICK)) as server, streamed(server, CHAT) as (_, lines):
        next(lines)
        lifecycle.loaded(replace(model, headers=lambda _: {"x-emberkv-route": "second"}))
        engine.resume()
        assert ": x-emberkv-route: first" in list(lines)


def test_a_request_that_waits_gets_no_headers(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=0)
    engine.is_full = True
    with serving(lifecycle, ServingSettings(stream_times=QUICK)) as server, ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, server.url + CHAT, json=BODIES[CHAT], timeout=DEADLINE)
        eventually(lambda: engine.running == 1)
        server.stop()
        lifecycle.interrupt_answers()
        refused = asked.result()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "stopped"


def test_headers_do_not_wait_for_ever(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=0)
    engine.is_full = True
    times = StreamTimes(headers=0.02, admission_check=0.01, ping=0.02)
    with serving(lifecycle, ServingSettings(stream_times=times)) as server, streamed(server, CHAT) as (response, lines):
        assert response.status_code == 200
        assert next(line for line in lines if line.startswith(": ping"))
        engine.is_full = False
        engine.resume()
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_before_the_first_token_has_its_status(client: Client, engine: FakeEngine, path: str) -> None:
    engine.script = Script("", finish=FinishReason.ERROR, error="it broke")
    failed = client.post(path, BODIES[path])
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "generation failed: it broke"


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.ERROR])
@pytest.mark.parametrize("path", BODIES)
def test_an_answer_is_counted_before_the_client_can_know_of_its_end(
    lifecycle: Lifecycle, client: Client, engine: FakeEngine, path: str, finish: FinishReason
) -> None:
    engine.script = Script("Hello", finish=finish, error="it broke", tokens_per_step=2)
    counted: list[bool] = []

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if any(end in message.get("body", b"") for end in (b"[DONE]", b"message_stop", b"it broke")):
                counted.append(lifecycle.running == 0)
            await send(message)

        await client.app(scope, receive, note)

    assert Client(noted).post(path, BODIES[path]).status_code == 200
    assert counted
    assert all(counted)


def test_a_shutdown_waits_for_a_slow_reader_of_an_answer_that_is_made(
    lifecycle: Lifecycle, client: Client, engine: FakeEngine
) -> None:
    engine.script = Script("Hello", tokens_per_step=2)
    drained: list[bool] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        drains: list[asyncio.Task[None]] = []

        async def wait(message: Message) -> None:
            if b'"finish_reason":"stop"' in message.get("body", b""):
                assert lifecycle.running == 0, "the answer is made"
                drains.append(asyncio.create_task(lifecycle.drain(DEADLINE)))
                lifecycle.interrupt_answers()
                for _ in range(20):
                    await asyncio.sleep(0)
                drained.append(lifecycle.drained.is_set())
            await send(message)

        await client.app(scope, receive, wait)
        await drains[0]
        drained.append(lifecycle.drained.is_set())

    answer = Client(slow).post(CHAT, BODIES[CHAT])
    assert drained == [False, True]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"error"' not in answer.text


def test_sdks_pass_over_pings_and_the_account(paused: HttpServer, engine: FakeEngine) -> None:
    gpt = openai.OpenAI(api_key="x", base_url=f"{paused.url}/v1", timeout=DEADLINE, max_retries=0)
    claude = anthropic.Anthropic(api_key="x", base_url=paused.url, timeout=DEADLINE, max_retries=0)
    timer = threading.Timer(0.1, engine.resume)
    with gpt.chat.completions.create(**BODIES[CHAT]) as chunks:
        timer.start()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello"
    engine.script = Script("Hello", pause_after=0)
    with claude.messages.stream(model=MODEL, max_tokens=50, messages=[{"role": "user", "content": "Hi"}]) as events:
        engine.resume()
        assert events.get_final_text() == "Hello"


def test_a_whole_answer_has_the_account_in_a_header(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", cached=8)
    whole = client.post(CHAT, {**BODIES[CHAT], "stream": False})
    assert whole.headers["x-emberkv-cache"] == "hit=8;pool=8;miss=11"
    assert "x-emberkv-cache" not in client.post(CHAT, BODIES[CHAT]).headers


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_is_answered(client: Client, path: str) -> None:
    answer = asyncio.run(_head(client, path))
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def _head(client: Client, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(client.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
        return await asking.head(path)


def test_pings_of_anthropic_are_events_of_that_name(paused: HttpServer, engine: FakeEngine) -> None:
    with streamed(paused, MESSAGES) as (_, lines):
        assert next(line for line in lines if line == "event: ping")
        engine.resume()
        kinds = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert [kind for kind in dict.fromkeys(kinds) if kind != "ping"] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip


def test_pings_of_responses_are_numbered_events(paused: HttpServer, engine: FakeEngine) -> None:
    with streamed(paused, RESPONSES) as (_, lines):
        events = [json.loads(line.removeprefix("data: ")) for line in islice(_data(lines), 4)]
        engine.resume()
        events += [json.loads(line.removeprefix("data: ")) for line in _data(lines)]
    assert [event["type"] for event in events[:4]] == ["response.created", *["response.in_progress"] * 3]
    assert events[3]["prefill"] == {"computed_tokens": 9, "prompt_tokens": 19}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


def _data(lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if line.startswith("data: "))


def test_what_comes_together_is_one_message_and_the_last_one_ends_the_stream(client: Client) -> None:
    bodies: list[Message] = []

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.body":
                bodies.append(message)
            await send(message)

        await client.app(scope, receive, note)

    assert Client(noted).post(CHAT, BODIES[CHAT]).status_code == 200
    assert b'"role":"assistant"' in bodies[0]["body"]
    assert b'"content":"H' in bodies[0]["body"]
    assert [message["more_body"] for message in bodies] == [*[True] * (len(bodies) - 1), False]
    assert b'"finish_reason":"stop"' in bodies[-1]["body"]
    assert bodies[-1]["body"].endswith(b"data: [DONE]\n\n")


def test_a_connection_that_takes_no_more_is_no_failure_of_the_answer(client: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=2)
    bodies: list[bytes] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail(message: Message) -> None:
            if message["type"] == "http.response.body":
                bodies.append(message["body"])
                raise OSError("the connection is closed")
            await send(message)

        await client.app(scope, receive, fail)

    Client(broken).post(CHAT, BODIES[CHAT])
    assert len(bodies) == 1
    assert b"error" not in bodies[0]
