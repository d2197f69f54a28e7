"""The harness around the servers: it waits, stops, refuses bad measurements and does its sums."""

import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from benchmarks import lib
from benchmarks.figures import Comparison, Middle
from benchmarks.random_qwen2 import VISIBLE, alphabet, make_tokenizer
from benchmarks.report import publish
from benchmarks.serving_ratios import steady_rate, whole_rate

from emberkv.bench.client import TimedAnswer, Usage
from emberkv.bench.runner import WORDS
from tests.bench.fake_server import FAKE, Event, FakeServer, piece, usage
from tests.waiting import DEADLINE


def python(*arguments: str) -> lib.Server:
    return lib.Server("test server", lambda port: [sys.executable, *arguments, str(port)], "/")


def test_a_server_answers_while_it_is_served_and_is_gone_afterwards(tmp_path: Path) -> None:
    server = python("-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path))
    with lib.serving(server, tmp_path / "log") as url:
        assert httpx.get(url, timeout=DEADLINE).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=DEADLINE)


def test_a_server_that_ends_early_is_named_with_its_log(tmp_path: Path) -> None:
    server = python("-c", "raise SystemExit('no model')")
    message = r"test server ended with 1 before it was ready; see .*log"
    with pytest.raises(RuntimeError, match=message), lib.serving(server, tmp_path / "log"):
        pass
    assert "no model" in (tmp_path / "log").read_text()


def ttft(events: Sequence[Event], *, cached: bool) -> float:
    async def measure() -> float:
        server = FakeServer(lambda _: events)
        async with server.client() as client:
            prompter = lib.Prompter(client, FAKE, random.Random(0), 1.0, server.clock)
            return await prompter.ttft(prompter.fresh(10), cached=cached)

    return asyncio.run(measure())


def answered(*, cached: int) -> list[Event]:
    return [(0.5, piece("one", finish="length")), (0.0, usage(100, 1, cached)), (0.0, "[DONE]")]


@pytest.mark.parametrize(("hit", "cached"), [(0, False), (4, False), (80, True)])
def test_a_first_token_is_timed_when_the_cache_did_what_it_should(hit: int, cached: bool) -> None:
    assert ttft(answered(cached=hit), cached=cached) == 0.5


@pytest.mark.parametrize(("hit", "cached", "wanted"), [(5, False, "needs at most 4"), (79, True, "needs at least 80%")])
def test_a_measurement_of_something_else_is_refused(hit: int, cached: bool, wanted: str) -> None:
    with pytest.raises(RuntimeError, match=f"{hit} of 100 prompt tokens were cached; .*{wanted}"):
        ttft(answered(cached=hit), cached=cached)


def test_a_failed_answer_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="boom"):
        ttft([(0.0, {"error": "boom"})], cached=False)


def test_fresh_prompts_differ_and_have_the_length_asked_for() -> None:
    async def texts() -> list[str]:
        async with FakeServer().client() as client:
            prompter = lib.Prompter(client, FAKE, random.Random(0), 1.5, FakeServer().clock)
            return [prompter.fresh(30), prompter.fresh(30)]

    one, other = asyncio.run(texts())
    assert one != other
    assert (len(one.split()), one[0]) == (20, " ")


def test_a_ratio_is_taken_round_by_round() -> None:
    row = Comparison("TTFT", "s", "ours", [1.0, 4.0, 9.0], "theirs", [2.0, 4.0, 3.0], 0.9)
    assert row.ratio == Middle(median=1.0, low=0.5, high=3.0, rounds=3)
    assert row.met is False
    assert row.cells() == [
        "TTFT", "ours: 4 (1 to 9) s", "theirs: 3 (2 to 4) s", "1 (0.5 to 3)", "<= 0.9", "no",
    ]  # fmt: skip


@pytest.mark.parametrize(("target", "at_least", "met"), [(2.0, True, True), (2.1, True, False), (2.0, False, True)])
def test_a_target_is_met_from_its_own_side(target: float, at_least: bool, met: bool) -> None:
    assert Comparison("x", "s", "a", [4.0], "b", [2.0], target, at_least).met is met


def test_the_exit_code_says_whether_targets_are_met(tmp_path: Path) -> None:
    good = Comparison("good", "s", "a", [1.0], "b", [2.0], 0.5)
    bad = Comparison("bad", "s", "a", [1.0], "b", [1.0], 0.5)
    shown = Comparison("shown", "s", "a", [1.0], "b", [1.0])
    assert publish([good, shown], {}, tmp_path / "result") == 0
    assert publish([good, bad], {}, None) == 1
    assert "| good | a: 1 s | b: 2 s |" in (tmp_path / "result.md").read_text()


def stream(*piece_times: float) -> TimedAnswer:
    return TimedAnswer(sent=0.0, piece_times=list(piece_times), ended=piece_times[-1])


def test_the_steady_rate_counts_only_while_all_streams_decode() -> None:
    answers = [stream(1.0, 2.0, 3.0, 4.0), stream(2.0, 3.0, 4.0, 5.0)]  # both decode from 2 to 4
    assert steady_rate(answers) == 2.0
    assert whole_rate(answers) == 8 / 5


def test_the_steady_rate_of_one_stream_leaves_out_its_prefill() -> None:
    assert steady_rate([stream(10.0, 10.5, 11.0)]) == 2.0


def test_a_piece_of_several_tokens_counts_as_many() -> None:
    answer = stream(1.0, 2.0, 3.0)
    answer.usage = Usage(completion_tokens=6)
    assert steady_rate([answer]) == 2.0


def test_streams_that_never_ran_together_have_no_steady_rate() -> None:
    with pytest.raises(RuntimeError, match="never ran at the same time"):
        steady_rate([stream(1.0, 2.0), stream(2.0, 3.0)])


def test_every_word_of_the_client_is_one_visible_token_of_the_random_model() -> None:
    tokenizer = make_tokenizer(8192, 128, random.Random(0))
    assert len(tokenizer) == 8192
    assert [len(tokenizer(f" {word}").input_ids) for word in WORDS] == [1] * len(WORDS)
    invisible = sum(letter not in VISIBLE for letter in alphabet())
    shown = [tokenizer.decode([token]).strip() for token in range(invisible, 8192)]
    assert all(text.isascii() and text.isprintable() and text for text in shown)
