"""The summary and the CSV say the same, to the last digit."""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.sim.config import Targets, Workload
from emberkv.sim.outcome import CacheEvent, RequestOutcome, Rows, Status, TurnKind, cache_event
from emberkv.sim.run import Results, run_simulation
from emberkv.sim.summary import percentile, percentiles, summarize
from tests.sim.build import config, single
from tests.workload.build import workload

CHATTY = workload(sessions=30, client={"turns": 4, "message": {"kind": "exponential", "mean": 90}})
HOW: dict[str, Any] = {
    "kv_blocks": 80, "replicas": 2, "slo": {"ttft_ms": 300.0, "tpot_ms": 25.0},
    "tiers": [{"name": "ram", "capacity": 2000, "read_gb_per_s": 1e-5, "write_gb_per_s": 1e-5}],
}  # fmt: skip


def ran(folder: Path, **changes: Any) -> tuple[Results, list[dict[str, str]]]:
    file = folder / "rows.csv"
    results = run_simulation(config(**{**HOW, **changes}), Workload(CHATTY, None, Path()), csv_file=file)
    with file.open(newline="") as rows:
        return results, list(csv.DictReader(rows))


def hits_of(rows: list[dict[str, str]]) -> int:
    """As their events name them."""
    return sum("HIT" in row["prefix_cache_event"] for row in rows)


def numbers(rows: list[dict[str, str]], column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column]]


def by_the_book(values: list[float]) -> dict[str, float]:
    """Nearest ranks: the value at place ceil(p/100 n), counted from 1."""
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[math.ceil(p * len(ordered) / 100) - 1] for p in (50, 90, 95, 99)}
    return {"mean": math.fsum(ordered) / len(ordered), **ranks, "min": ordered[0], "max": ordered[-1]}


def test_every_figure_follows_from_the_rows_as_written(tmp_path: Path) -> None:
    results, rows = ran(tmp_path)
    summary = json.loads(json.dumps(results.summary))
    done = [row for row in rows if row["status"] == "completed"]
    assert summary["requests"] == {
        "total": len(rows),
        **{status.value: sum(row["status"] == status.value for row in rows) for status in Status},
    }
    for name in ("ttft_ms", "tpot_ms", "e2e_latency_ms"):
        assert summary[name] == by_the_book(numbers(done, name))
    prompts, cached = sum(numbers(done, "prompt_tokens")), sum(numbers(done, "cached_prefix_length"))
    prefilled = sum(numbers(done, "tokens_actually_prefilled"))
    later = [row for row in done if row["is_conversational_turn"] == "true"]
    assert summary["prefix_caching"] == {
        "token_hit_rate": cached / prompts,
        "request_hit_rate": hits_of(done) / len(done),
        "overall_hit_rate": hits_of(done) / len(done),
        "conversational_token_hit_rate": sum(numbers(later, "cached_prefix_length"))
        / sum(numbers(later, "prompt_tokens")),
        "conversational_hit_rate": hits_of(later) / len(later),
        "conversational_requests": len(later),
        "event_counts": {
            each.value: Counter(row["prefix_cache_event"] for row in done)[each.value] for each in CacheEvent
        },
        "average_cached_prefix_length": cached / len(done),
        "average_tokens_prefilled": prefilled / len(done),
        "prefill_reduction_ratio": 1 - prefilled / prompts,
        "tokens_recomputed": max(0, cached + prefilled - prompts),
        "total_tokens_saved": cached,
    }
    assert summary["success_rate"] == len(done) / len(rows)
    duration = max(numbers(done, "completion_time")) - min(numbers(done, "arrival_time"))
    assert summary["duration"] == duration
    assert summary["throughput"]["output_tokens_per_second"] == sum(numbers(done, "output_tokens")) / duration
    ram = sum(numbers(done, "ram_tokens"))
    assert ram > 0
    assert summary["tiers"]["ram"]["tokens"] == ram
    assert summary["tiers"]["pool"]["tokens"] == cached - ram
    assert summary["preemptions"] == sum(numbers(rows, "preemptions"))
    both = sum(float(row["ttft_ms"]) <= 300 and float(row["tpot_ms"] or 0) <= 25 for row in done)
    assert summary["slo"]["all"] == both / sum(row["status"] != "rejected" for row in rows)
    assert [each["requests"] for each in summary["replicas"]] == [
        sum(row["replica"] == str(index) for row in done) for index in range(2)
    ]


def test_times_in_a_row_agree_with_each_other(tmp_path: Path) -> None:
    _, rows = ran(tmp_path)
    for row in (row for row in rows if row["status"] == "completed"):
        ttft = 1000 * (float(row["first_token_time"]) - float(row["arrival_time"]))
        assert float(row["ttft_ms"]) == pytest.approx(ttft, abs=1e-6)
        assert float(row["e2e_latency_ms"]) >= float(row["ttft_ms"])


def test_the_warm_up_is_in_neither(tmp_path: Path) -> None:
    _, everything = ran(tmp_path)
    results, rows = ran(tmp_path, warm_up=9.0)
    assert rows == [row for row in everything if float(row["arrival_time"]) >= 9.0]
    assert 0 < len(rows) < len(everything)
    assert results.summary["requests"]["total"] == len(rows)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, _ = ran(tmp_path)
    one = (tmp_path / "rows.csv").read_bytes()
    second, _ = ran(tmp_path)
    assert (tmp_path / "rows.csv").read_bytes() == one
    assert json.dumps(first.summary) == json.dumps(second.summary)


def test_the_cache_is_worth_what_it_saves_over_the_same_requests(tmp_path: Path) -> None:
    on, rows_on = ran(tmp_path, kv_blocks=1000, tiers=[])
    off, rows_off = ran(tmp_path, kv_blocks=1000, tiers=[], prefix_caching=False)
    assert {row["request_id"] for row in rows_on} == {row["request_id"] for row in rows_off}
    assert off.summary["prefix_caching"]["token_hit_rate"] == 0
    assert on.summary["prefix_caching"]["prefill_reduction_ratio"] > 0.45
    assert on.summary["ttft_ms"]["mean"] < off.summary["ttft_ms"]["mean"]


def test_memory_over_time_ends_with_what_is_cached(tmp_path: Path) -> None:
    results, _ = ran(tmp_path)
    found = results.summary["memory_over_time"]
    assert 32 < len(found["seconds"]) <= 64
    assert len(found["tier_bytes"]["ram"]) == len(found["used_blocks"]) == len(found["seconds"])
    assert max(found["cached_blocks"]) <= 160
    assert max(found["tier_bytes"]["ram"]) <= 4000
    assert max(found["used_blocks"]) > 0


def test_a_simulation_of_nothing_has_a_summary() -> None:
    summary = summarize(Rows(), slo=Targets(ttft_ms=1.0))
    assert summary["requests"]["total"] == 0
    assert summary["ttft_ms"] is None
    assert summary["prefix_caching"]["token_hit_rate"] == 0.0
    assert summary["slo"]["all"] == 0.0


@pytest.mark.parametrize(
    ("turn", "prompt", "cached", "event"),
    [
        (TurnKind.FIRST, 100, 0, CacheEvent.MISS_FULL),
        (TurnKind.FIRST, 100, 16, CacheEvent.CROSS_REQUEST_HIT),
        (TurnKind.CONTINUES, 100, 16, CacheEvent.CONVERSATIONAL_HIT),
        (TurnKind.CONTINUES, 100, 0, CacheEvent.MISS_FULL),
        (TurnKind.UNEXPECTED, 100, 0, CacheEvent.CONVERSATIONAL_MISS_UNEXPECTED_PROMPT),
        (TurnKind.UNEXPECTED, 100, 16, CacheEvent.CONVERSATIONAL_HIT),
        (TurnKind.FIRST, 100, 99, CacheEvent.FULL_HIT_NO_PREFILL_NEEDED),
        (TurnKind.UNEXPECTED, 100, 99, CacheEvent.FULL_HIT_NO_PREFILL_NEEDED),
        (TurnKind.FIRST, 1, 0, CacheEvent.MISS_FULL),
    ],
)
def test_what_a_request_found_has_a_name(turn: TurnKind, prompt: int, cached: int, event: CacheEvent) -> None:
    assert cache_event(turn, prompt, cached) is event


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_are_values_that_enough_do_not_exceed(values: list[float], percent: float) -> None:
    found = percentile(sorted(values), percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values)
    assert sum(value < found for value in values) < percent / 100 * len(values)


def test_percentiles_leave_out_what_is_not_there() -> None:
    assert percentiles([None, None]) is None
    assert percentiles([3.0, None, 1.0]) == {
        "mean": 2.0,
        "p50": 1.0,
        "p90": 3.0,
        "p95": 3.0,
        "p99": 3.0,
        "min": 1.0,
        "max": 3.0,
    }


TIMES = st.none() | st.integers(0, 2**60)
COUNTS = st.integers(0, 2**31 - 1)


@st.composite
def any_outcomes(draw: st.DrawFn) -> RequestOutcome:
    return RequestOutcome(
        single(draw(st.text(max_size=3)), draw(COUNTS), 1),
        draw(st.sampled_from(Status)),
        draw(st.integers(0, 2**60)),
        first_token=draw(TIMES),
        completion=draw(TIMES),
        output_tokens=draw(COUNTS),
        turn=draw(st.sampled_from(TurnKind)),
        event=draw(st.none() | st.sampled_from(CacheEvent)),
        cached_tokens=draw(COUNTS),
        prefilled_tokens=draw(COUNTS),
        tier_tokens=draw(st.dictionaries(st.sampled_from(["a", "b"]), COUNTS)),
        replica=draw(st.none() | st.integers(0, 2000)),
        preemptions=draw(st.integers(0, 9)),
        retries=draw(st.integers(0, 9)),
    )


@settings(max_examples=60)
@given(st.lists(any_outcomes(), max_size=8))
def test_rows_give_back_what_they_were_given(outcomes: list[RequestOutcome]) -> None:
    rows = Rows(("a", "b"), keep_ids=True)
    for outcome in outcomes:
        rows.add(outcome)
    assert len(rows) == len(outcomes)
    assert rows.ids == [each.request.request_id for each in outcomes]
    for row, each in zip(rows, outcomes, strict=True):
        assert (row.arrival, row.first_token, row.completion) == (each.arrival, each.first_token, each.completion)
        assert (row.prompt_tokens, row.output_tokens) == (each.request.prompt_tokens, each.output_tokens)
        assert (row.status, row.event, row.conversational) == (each.status, each.event, each.turn is not TurnKind.FIRST)
        assert (row.cached_tokens, row.prefilled_tokens) == (each.cached_tokens, each.prefilled_tokens)
        assert (row.replica, row.preemptions, row.retries) == (each.replica, each.preemptions, each.retries)
        assert row.tier_tokens == tuple(each.tier_tokens.get(name, 0) for name in ("a", "b"))
