"""Streams of foreign workers through a gateway: what passes, what begins late, and how each ends."""

import asyncio
import json

import httpx
import pytest

from emberkv.serving.app import ServingSettings
from emberkv.serving.event_stream import StreamTimes
from tests.cluster.fake_openai import TOKENS, FakeOpenAI
from tests.cluster.foreign_gateway import chat, served
from tests.waiting import on_a_loop, until


@on_a_loop
async def test_a_stream_is_passed_on_without_the_usage_that_only_the_gateway_asked_for() -> None:
    async with served(FakeOpenAI(cached=48)) as it:
        answer = await it.ask(chat(stream=True))
        chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        assert answer.text.endswith("data: [DONE]\n\n")
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "".join(TOKENS)
        assert not any("usage" in chunk for chunk in chunks)
        assert json.loads(it.servers[0].requests[0][0])["stream_options"] == {"include_usage": True}
        assert it.fleet.workers[0].cached_tokens == 48


@on_a_loop
async def test_a_client_that_asks_for_usage_gets_it() -> None:
    async with served(FakeOpenAI(cached=48)) as it:
        answer = await it.ask(chat(stream=True, stream_options={"include_usage": True}))
        last = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


@on_a_loop
async def test_a_stream_whose_first_event_is_an_error_is_retried_elsewhere_and_the_error_kept_where_all_fail() -> None:
    async with served(FakeOpenAI(fails_early=True), FakeOpenAI()) as it:
        for _ in range(4):
            answer = await it.ask(chat(stream=True))
            assert "three" in answer.text
            assert "out of memory" not in answer.text
        it.servers[1].fails_early = True
        answer = await it.ask(chat(stream=True))
        assert "out of memory" in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


@on_a_loop
async def test_a_stream_gets_headers_and_pings_while_no_worker_has_begun_it() -> None:
    times = StreamTimes(headers=0.0, ping=0.0)
    app = ServingSettings(bound_to_loopback=True, stream_times=times)
    async with served(FakeOpenAI(), FakeOpenAI(), app=app) as it:
        for server in it.servers:
            server.held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat(stream=True)))
        await until(lambda: sum(it.asked()) == 1)
        first = it.asked().index(1)
        it.servers[first].dies_after = 0
        for server in it.servers:
            assert server.held is not None
            server.held.set()
        answer = await asked
        assert answer.status_code == 200
        assert ": ping: " in answer.text.partition("data:")[0]
        assert f": x-emberkv-route: worker={'ba'[first]};" in answer.text
        assert "three" in answer.text


@on_a_loop
async def test_a_late_refusal_is_the_last_event_of_the_stream() -> None:
    app = ServingSettings(bound_to_loopback=True, stream_times=StreamTimes(headers=0.0, ping=10.0))
    async with served(FakeOpenAI(status=503), app=app) as it:
        answer = await it.ask(chat(stream=True))
        assert (answer.status_code, answer.text) == (
            200,
            f": x-emberkv-route: {route_of(answer)}\n\n"
            'data: {"error":{"message":"no","type":"server_error","param":null,"code":null}}\n\ndata: [DONE]\n\n',
        )


def route_of(answer: httpx.Response) -> str:
    """What a late stream says of the route."""
    line = next(line for line in answer.text.splitlines() if line.startswith(": x-emberkv-route: "))
    return line.removeprefix(": x-emberkv-route: ")


@on_a_loop
async def test_an_answer_that_breaks_off_ends_with_an_error() -> None:
    async with served(FakeOpenAI(dies_after=2), FakeOpenAI(dies_after=2)) as it:
        answer = await it.ask(chat(stream=True))
        events = answer.text.split("\n\n")
        assert "One" in events[1]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert events[-2:] == ["data: [DONE]", ""]
        assert sum(worker.lost for worker in it.fleet.workers) == 1
        assert sum(it.asked()) == 1


@on_a_loop
async def test_a_stream_that_is_done_without_a_reason_to_end_is_an_error() -> None:
    async with served(FakeOpenAI(reason=None)) as it:
        answer = await it.ask(chat(stream=True))
        events = answer.text.split("\n\n")
        assert TOKENS[-1] in events[3]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert answer.text.count("[DONE]") == 1
        assert it.fleet.workers[0].lost == 1


@on_a_loop
async def test_an_empty_stream_is_retried_elsewhere_and_else_an_error() -> None:
    async with served(FakeOpenAI(body=[]), FakeOpenAI()) as it:
        for _ in range(3):
            assert "three" in (await it.ask(chat(stream=True))).text
        it.servers[1].body = []
        answer = await it.ask(chat(stream=True))
        assert (answer.status_code, answer.json()["error"]["message"]) == (502, "the worker's answer has no choices")


@on_a_loop
async def test_a_client_that_asks_for_a_stream_gets_one_of_a_worker_that_does_not_stream() -> None:
    calls = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    async with served(FakeOpenAI(streams=False, message={"content": "I", "tool_calls": calls}, cached=48)) as it:
        answer = await it.ask(chat(stream=True))
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-emberkv-cache"].startswith("hit=48;")
        first, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        part = json.loads(first.removeprefix("data: "))
        assert (part["object"], "usage" in part) == ("chat.completion.chunk", False)
        delta = {"role": "assistant", "content": "I", "tool_calls": [{"index": 0, **calls[0]}]}
        assert part["choices"] == [{"index": 0, "delta": delta, "finish_reason": "stop"}]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_whole_answer_without_a_reason_to_end_is_not_a_complete_stream(path: str) -> None:
    @on_a_loop
    async def ask() -> None:
        async with served(FakeOpenAI(streams=False, message={"content": "I"}, reason=None)) as it:
            answer = await it.ask(chat(stream=True, max_tokens=4), path)
            assert (answer.status_code, "has no finish_reason" in answer.text) == (502, True)

    ask()


@on_a_loop
async def test_a_stream_without_done_is_whole_once_every_answer_has_its_reason_to_end() -> None:
    async with served(FakeOpenAI(sends_done=False)) as it:
        answer = await it.ask(chat(stream=True))
        assert "error" not in answer.text
        assert TOKENS[-1] in answer.text
