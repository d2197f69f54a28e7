"""Replays without time: small ones by hand, and the published figures of the Mooncake conversation trace."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.measured_elsewhere import MOONCAKE

from emberkv.sim.build import machine_of
from emberkv.sim.cache_only import Replay
from emberkv.sim.config import SimulationConfig, TraceConfig, Workload, with_changes
from emberkv.sim.outcome import CacheEvent, RequestOutcome, Rows
from emberkv.sim.run import Results, run_simulation
from emberkv.sim.summary import summarize
from emberkv.workload.description import UnlimitedCache
from emberkv.workload.request import Request
from emberkv.workload.source import TraceSource
from emberkv.workload.trace import read_trace
from tests.sim.build import config, mixed_requests, single, turn
from tests.workload.build import jsonl, mooncake_line, span


def replay(trace: Path, **changes: Any) -> Results:
    settings = with_changes(SimulationConfig(), {"cache_only": True, **changes})
    return run_simulation(settings, Workload(None, TraceConfig(path=trace.name), trace.parent))


def blocks(results: Results) -> tuple[int, int]:
    found = results.summary["blocks"]
    return found["hits"], found["references"]


def outcomes(requests: list[Request], **changes: Any) -> dict[str, RequestOutcome]:
    settings = config(**changes)
    found: list[RequestOutcome] = []
    Replay(settings, machine_of(settings, 10)).run(TraceSource(requests), found.append, lambda done, now: None)
    return {each.request.request_id: each for each in found}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations of 512-token blocks that share block 0, the first one asked three times, growing."""
    prompts = [(1500, [0, 1, 2]), (1500, [0, 3, 4]), (2048, [0, 1, 5, 6]), (1500, [0, 3, 4]), (2100, [0, 1, 5, 6, 7])]
    return jsonl(tmp_path / "t.jsonl", *(mooncake_line(1000 * at, *each) for at, each in enumerate(prompts)))


def test_a_pool_that_is_large_enough_finds_all_there_is(trace: Path) -> None:
    """Blocks found: none; 0; 0 1; 0 3 4, the partial one with them; 0 1 5 6."""
    assert blocks(replay(trace, kv_blocks=100)) == (0 + 1 + 2 + 3 + 4, 18)


def test_a_pool_that_is_small_loses_tails_first(trace: Path) -> None:
    """Of five blocks, 0 1 2 and then 3 4 fill all; 5 and 6 take the places of 2 and 4; then 4 that of 6; then 6 and 7
    those of 4 and 3.
    """
    assert blocks(replay(trace, kv_blocks=5)) == (0 + 1 + 2 + 2 + 3, 18)


def test_what_does_not_fit_is_rejected_and_the_rest_go_on(trace: Path) -> None:
    results = replay(trace, kv_blocks=4)
    assert results.summary["requests"] == {"total": 5, "completed": 4, "rejected": 1, "failed": 0, "unfinished": 0}


def test_tokens_of_a_whole_prompt_are_no_more_than_it_has() -> None:
    found = outcomes([single("a", 25, 1, at=0), turn("s", 0, 25, 5, at=1), turn("t", 0, 25, 5, at=2)])
    again = outcomes([turn("s", 0, 25, 5), turn("s", 0, 25, 5)])
    assert found["a"].cached_tokens == 0
    assert (again["s.0"].cached_tokens, again["s.0"].prefilled_tokens) == (25, 0)


def test_answers_that_are_told_are_cached_too() -> None:
    found = outcomes([turn("s", 0, 100, 50), turn("s", 1, 200, 5)])
    assert (found["s.1"].cached_tokens, found["s.1"].prefilled_tokens) == (150, 50)
    assert found["s.1"].event is CacheEvent.CONVERSATIONAL_HIT


def test_clients_with_salts_share_nothing() -> None:
    pair = [single(name, 60, 1, span("system", 60), client_id=name) for name in ("a", "b")]
    assert outcomes(pair)["b"].cached_tokens == 60
    assert outcomes(pair, salted=True)["b"].cached_tokens == 0


@pytest.mark.parametrize("seed", range(5))
def test_without_limit_it_finds_what_a_description_says(seed: int) -> None:
    requests = [each for each in mixed_requests(seed, 60) if each.prompt_tokens]
    unlimited = UnlimitedCache(10)
    for each in requests:
        unlimited.add(each)
    found = outcomes(requests, kv_blocks=10_000)
    assert sum(each.cached_tokens for each in found.values()) == unlimited.hit_tokens
    assert unlimited.hit_tokens > 0


def test_mooncake_without_limit() -> None:
    results = replay(MOONCAKE, kv_blocks=200_000)
    assert blocks(results) == (105_710, 288_500)
    assert results.stats[0][0].committed_blocks == 182_790
    assert round(results.summary["prefix_caching"]["token_hit_rate"], 4) == 0.3736


@cache
def mooncake() -> list[Request]:
    """The trace, read once."""
    return list(read_trace(MOONCAKE))


def over_mooncake(**changes: Any) -> dict[str, Any]:
    """A summary, with the load of each replica (tokens computed)."""
    settings = with_changes(SimulationConfig(), {"cache_only": True, **changes})
    rows, uncached = Rows(), [0] * settings.replicas
    Replay(settings, machine_of(settings, 512)).run(TraceSource(mooncake()), rows.add, lambda done, now: None)
    for row in rows:
        assert row.replica is not None
        uncached[row.replica] += row.prefilled_tokens
    return {**summarize(rows, blocks_of=512), "uncached": uncached}


LRU = {1_000: 0.0445, 3_000: 0.0653, 6_000: 0.1393, 10_000: 0.2116, 30_000: 0.3257, 50_000: 0.3546, 100_000: 0.3637}
LFU = {1_000: 0.048, 3_000: 0.075, 6_000: 0.098, 10_000: 0.132, 30_000: 0.276, 50_000: 0.344, 100_000: 0.363}


IN_SHORT = {10_000}
"""Capacities whose replays are not left to ``--long``; the curves' tests have LRU's in one pass, and LFU's end."""


@pytest.mark.parametrize(("capacity", "rate"), LRU.items())
def test_mooncake_by_capacity_with_lru(capacity: int, rate: float, long: bool) -> None:
    if not (long or capacity in IN_SHORT):
        pytest.skip("only with --long")
    assert round(over_mooncake(kv_blocks=capacity)["blocks"]["hit_rate"], 4) == rate


@pytest.mark.parametrize(("capacity", "rate"), LFU.items())
def test_mooncake_by_capacity_with_lfu(capacity: int, rate: float, long: bool) -> None:
    if not (long or capacity in IN_SHORT):
        pytest.skip("only with --long")
    found = over_mooncake(kv_blocks=capacity, eviction="lfu")["blocks"]["hit_rate"]
    assert round(found, 3) == rate


ROUTING = {
    "random": (0.106, 1.13),
    "least-loaded": (0.113, 1.01),
    "round-robin": (0.113, 1.04),
    "longest-prefix": (0.136, 8.0),
    "prefix-minus-load": (0.303, 1.01),
    "consistent-hashing": (0.353, 1.08),
    "expected-ttft": (0.353, 1.0),
}
"""Of 8 nodes of 5,859 blocks: hit rate, and the largest node's uncached tokens as a multiple of the mean."""


ROUTING_IN_SHORT = ("least-loaded", "consistent-hashing", "expected-ttft")
"""Policies that are not left to ``--long``: one that ignores prefixes, and the two that find most."""

RISING = ("random", "least-loaded", "longest-prefix", "prefix-minus-load", "consistent-hashing")
POOLED = 0.354
"""The hit rate of one node with the blocks of all eight."""


def test_mooncake_by_routing_policy(long: bool) -> None:
    """Near the published figures, and in their order; the first two and a half are within a hundredth of each other."""
    rates = {}
    for name in ROUTING if long else ROUTING_IN_SHORT:
        rate, imbalance = ROUTING[name]
        found = over_mooncake(kv_blocks=5_859, replicas=8, routing=name)
        rates[name], uncached = found["blocks"]["hit_rate"], found["uncached"]
        assert rates[name] == pytest.approx(rate, abs=0.02)
        assert max(uncached) / (sum(uncached) / 8) == pytest.approx(imbalance, abs=0.15)
    assert all(low < high for low, high in pairwise(rates[name] for name in RISING if name in rates))
    assert rates["expected-ttft"] >= 0.97 * POOLED
    if long:
        assert rates["random"] < rates["round-robin"] < rates["longest-prefix"]
        assert round(over_mooncake(kv_blocks=8 * 5_859)["blocks"]["hit_rate"], 3) == POOLED
