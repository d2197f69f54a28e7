"""Figures: percentiles, rates and shares that can be worked out by hand."""

import asyncio
import io
import json
from collections.abc import Sequence
from itertools import count
from typing import Any

import httpx
import pytest
from rich.console import Console

from emberkv.bench.runner import BenchWorkload, RequestRecord
from emberkv.bench.summary import Percentiles, Summary, as_json, percentile, percentiles, render, summarize
from tests.bench.fake_server import PLAIN, Event, FakeServer, finish, piece, usage

FOUR = BenchWorkload(sessions=2, turns=2, concurrency=1)


def shown(summary: Summary) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(summary, "title"))
    return console.export_text()


def run(server: FakeServer) -> list[RequestRecord]:
    return asyncio.run(server.run(FOUR))


def answers(*scripts: Sequence[Event]) -> FakeServer:
    """A server whose nth answer is the nth script."""
    turn = count()
    return FakeServer(lambda _: scripts[next(turn)])


def timed(seconds: float) -> list[Event]:
    return [(seconds, piece("one")), (0.5, piece(" two", finish="length")), (0.0, usage(10, 2)), (0.0, "[DONE]")]


def cached(tokens: int | None) -> list[Event]:
    return [(0.5, piece("one", finish="length")), (0.0, usage(100, 1, tokens)), (0.0, "[DONE]")]


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 2.5), (0.9, 3.7), (1.0, 4.0)])
def test_percentiles_interpolate_between_neighbours(q: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], q) == pytest.approx(value)


def test_one_value_is_every_percentile_of_itself() -> None:
    assert percentiles([3.0]) == Percentiles(n=1, p50=3.0, p90=3.0, p99=3.0)


def test_no_values_have_no_percentiles() -> None:
    assert percentiles([]) is None


def test_times_to_first_token_are_told_apart_by_phase() -> None:
    summary = summarize(run(answers(timed(8.0), timed(1.0), timed(4.0), timed(2.0))))
    assert summary.ttft["cold"] == percentiles([8.0])
    assert summary.ttft["first turn"] == percentiles([4.0])
    assert summary.ttft["follow-up turn"] == percentiles([1.0, 2.0])
    assert summary.ttft["warm"] == percentiles([1.0, 2.0, 4.0])
    assert summary.inter_token == percentiles([0.5] * 4)


def test_the_rate_is_all_tokens_over_the_whole_time() -> None:
    summary = summarize(run(answers(timed(8.0), timed(1.0), timed(4.0), timed(2.0))))
    assert (summary.output_tokens, summary.total) == (8, 17.0)
    assert summary.output_tokens_per_second == pytest.approx(8 / 17)


def test_the_cached_share_is_of_all_prompt_tokens() -> None:
    summary = summarize(run(answers(cached(0), cached(80), cached(40), cached(90))))
    assert (summary.cached_tokens, summary.prompt_tokens, summary.cached_share) == (210, 400, 0.525)
    assert "52.5% (210 of 400 prompt tokens)" in shown(summary)


def test_a_count_left_out_of_a_cold_answer_is_0() -> None:
    summary = summarize(run(answers(cached(None), cached(80), cached(80), cached(80))))
    assert summary.cached_share == 0.6


def test_a_server_that_reports_no_cached_tokens_is_not_said_to_have_none() -> None:
    summary = summarize(run(FakeServer()))
    assert (summary.prompt_tokens, summary.cached_tokens, summary.cached_share) == (80, None, None)
    assert "not reported" in shown(summary)


def test_failures_are_counted_and_leave_the_figures_alone() -> None:
    boom = httpx.Response(500, text="boom")
    turn = count()

    def script(_: dict[str, Any]) -> Sequence[Event] | httpx.Response:
        return boom if next(turn) == 0 else PLAIN

    summary = summarize(run(FakeServer(script)))
    assert (summary.requests, summary.failed, summary.not_sent) == (4, 1, 1)
    assert (summary.output_tokens, summary.ttft["cold"]) == (4, percentiles([0.5]))
    assert "4 (1 failed, 1 not sent)" in shown(summary)


def test_answers_without_text_or_counts_are_pointed_out() -> None:
    empty: list[Event] = [(0.5, finish("stop")), (0.0, "[DONE]")]
    summary = summarize(run(answers(empty, cached(0), cached(0), cached(0))))
    assert (summary.textless, summary.uncounted) == (1, 1)
    assert "1 answers had no visible text" in shown(summary)
    assert "1 answers came without token counts" in shown(summary)


def test_json_has_the_summary_and_a_row_for_each_request() -> None:
    records = run(answers(cached(0), cached(80), cached(40), cached(90)))
    result = json.loads(json.dumps(as_json(records, summarize(records))))
    assert result["summary"]["cached_share"] == 0.525
    rows = result["requests"]
    assert [(row["session"], row["turn"], row["cached_tokens"]) for row in rows] == [
        (0, 0, 0), (0, 1, 80), (1, 0, 40), (1, 1, 90),
    ]  # fmt: skip
    assert rows[1]["ttft"] == 0.5
    assert rows[1]["phase"] == "follow-up turn"
    assert rows[1]["error"] is None
