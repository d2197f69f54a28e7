"""One request, timed: what counts as its first token, and what is said of one that fails."""

import asyncio
from typing import Any

import httpx
import pytest

from emberkv.bench.client import Endpoint, Target, flatten
from emberkv.bench.runner import BenchWorkload
from tests.bench.fake_server import PLAIN, Event, FakeServer, finish, piece, usage


def test_times_are_measured_from_sending_and_skip_the_empty_first_delta() -> None:
    answer = asyncio.run(FakeServer().ask())
    assert answer.error is None
    assert answer.ttft == 0.5
    assert answer.gaps == [0.125]
    assert answer.ended - answer.sent == 1.0
    assert answer.text == "one two"
    assert answer.output_tokens == 2


def test_text_and_finish_in_one_chunk_is_a_whole_answer() -> None:
    events = [(0.25, piece("one", finish="length")), (0.5, "[DONE]")]
    answer = asyncio.run(FakeServer(lambda _: events).ask())
    assert (answer.ttft, answer.text, answer.gaps, answer.error) == (0.25, "one", [], None)


def test_an_answer_without_text_is_timed_to_its_finish() -> None:
    events = [(0.25, piece("")), (0.5, finish("stop")), (0.5, "[DONE]")]
    answer = asyncio.run(FakeServer(lambda _: events).ask())
    assert (answer.ttft, answer.piece_times, answer.error) == (0.75, [], None)


def test_reasoning_is_visible_but_not_history() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    events = [(0.25, thought), (0.5, piece("one", finish="stop")), (0.0, "[DONE]")]
    answer = asyncio.run(FakeServer(lambda _: events).ask())
    assert (answer.ttft, answer.text) == (0.25, "one")


def test_the_servers_count_of_tokens_goes_before_the_number_of_pieces() -> None:
    events = [(0.5, piece("one two three", finish="length")), (0.0, usage(9, 3, 8)), (0.0, "[DONE]")]
    answer = asyncio.run(FakeServer(lambda _: events).ask())
    assert answer.output_tokens == 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (9, 8)


def test_pieces_are_counted_where_the_server_counts_nothing() -> None:
    answer = asyncio.run(FakeServer(lambda _: [*PLAIN[:4], (0.0, "[DONE]")]).ask())
    assert (answer.usage, answer.output_tokens) == (None, 2)


FAILURES: dict[str, tuple[Any, str]] = {
    "an HTTP error": (httpx.Response(429, text="slow down"), "HTTP 429: slow down"),
    "an error event": ([(0.0, piece("one")), (0.0, {"error": {"message": "boom"}})], "boom"),
    "no JSON": ([(0.0, "nonsense")], "nonsense"),
    "the wrong shape": ([(0.0, {"choices": 3})], "an OpenAI chunk was expected"),
    "no end mark": ([(0.0, piece("one"))], "[DONE]"),
    "nothing at all": ([(0.0, "[DONE]")], "neither text nor a finish reason"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_told_in_the_answer(failure: str) -> None:
    events, message = FAILURES[failure]
    answer = asyncio.run(FakeServer(lambda _: events).ask())
    assert answer.error is not None
    assert message in answer.error


def test_a_connection_that_breaks_is_told_in_the_answer() -> None:
    def refuse(_: dict[str, Any]) -> list[Event]:
        raise httpx.ReadTimeout("no byte came")

    answer = asyncio.run(FakeServer(refuse).ask())
    assert answer.error == "ReadTimeout: no byte came"


def test_a_chat_request_asks_for_greedy_full_length_streaming_with_usage() -> None:
    server = FakeServer()
    asyncio.run(server.ask(Target("fake", seed=7)))
    body = server.bodies[0]
    assert server.paths == ["/v1/chat/completions"]
    assert body.pop("messages") == [BenchWorkload().question(0, 0)]
    assert body == {
        "model": "fake", "max_tokens": 4, "temperature": 0, "seed": 7, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_without_extensions_only_openais_own_fields_are_sent() -> None:
    server = FakeServer()
    asyncio.run(server.ask(Target("fake", extensions=False)))
    assert "ignore_eos" not in server.bodies[0]


def test_completions_send_and_read_text() -> None:
    events = [(0.5, {"choices": [{"text": " one", "finish_reason": "length"}]}), (0.0, "[DONE]")]
    server = FakeServer(lambda _: events)
    answer = asyncio.run(server.ask(Target("fake", Endpoint.COMPLETIONS)))
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == BenchWorkload().question(0, 0)["content"]
    assert (answer.ttft, answer.text) == (0.5, " one")


def test_a_flattened_conversation_ends_where_the_answer_begins_and_extends_the_earlier_one() -> None:
    workload = BenchWorkload(system_tokens=3)
    first = [*workload.opening(), workload.question(0, 0)]
    then = [*first, {"role": "assistant", "content": "one"}, workload.question(0, 1)]
    assert flatten(first).endswith("\n\nassistant:")
    assert flatten(then).startswith(flatten(first))
