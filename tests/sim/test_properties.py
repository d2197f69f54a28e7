"""Random workloads on random set-ups: what must hold whatever happens."""

import io
from random import Random
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from emberkv.cluster.routing import ROUTER_NAMES
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.sim.outcome import CsvRows, Status
from tests.sim.build import Ran, mixed_requests, run

TIERS = [
    {"name": "ram", "capacity": 30, "read_gb_per_s": 1e-6, "write_gb_per_s": 1e-6},
    {
        "name": "disk",
        "capacity": 400,
        "read_gb_per_s": 1e-7,
        "write_gb_per_s": 1e-6,
        "latency_us": 500.0,
        "keeps": True,
    },
]
"""Of blocks of 10 or 40 bytes, so of 0 to 40 blocks; at 1 ms a token, some loads are worth it and some are not."""


@st.composite
def set_ups(draw: st.DrawFn) -> dict[str, Any]:
    replicas = draw(st.integers(1, 3))
    return {
        "kv_blocks": draw(st.integers(8, 60)),
        "block_size": draw(st.sampled_from([1, 4, 10])),
        "eviction": draw(st.sampled_from(POLICY_NAMES)),
        "routing": draw(st.sampled_from(ROUTER_NAMES)),
        "replicas": replicas,
        "prefill_chunk": draw(st.sampled_from([10, 30, 200])),
        "max_step_tokens": draw(st.sampled_from([10, 64, 200])),
        "max_running": draw(st.sampled_from([1, 3, 50])),
        "seed": draw(st.integers(0, 3)),
        "max_retries": draw(st.integers(0, 2)),
        "random_outages": draw(st.sampled_from([None, {"mean_time_up": 5.0, "mean_time_down": 1.0}])),
        "tiers": draw(st.sampled_from([[], TIERS, [{**TIERS[1], "shared": True}]])),
        "hit_unit": draw(st.sampled_from([None, 1])),
        "tenant_weights": draw(st.sampled_from([{}, {"c0": 3.0}])),
    }


FAILS_WITHIN_A_RUN: dict[str, Any] = {
    "kv_blocks": 28, "block_size": 1, "eviction": "lru", "routing": "random", "replicas": 1, "prefill_chunk": 10,
    "max_step_tokens": 10, "max_running": 1, "seed": 1, "random_outages": {"mean_time_up": 5.0, "mean_time_down": 1.0},
}  # fmt: skip
"""The step under way when the replica fails has evicted a block."""

WORKLOADS = st.builds(mixed_requests, st.integers(0, 1_000_000), st.integers(0, 30))


def csv_of(ran: Ran, tiers: tuple[str, ...] = ("ram", "disk")) -> str:
    file = io.StringIO()
    table = CsvRows(file, tiers)
    for outcome in ran.outcomes.values():
        table.add(outcome)
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(WORKLOADS, set_ups())
def test_everybody_has_an_outcome_and_everything_is_given_back(requests: list[Any], how: dict[str, Any]) -> None:
    ran = run(requests, **how)
    assert ran.outcomes.keys() == {request.request_id for request in requests}
    for outcome in ran.outcomes.values():
        request = outcome.request
        assert outcome.status is not Status.UNFINISHED
        if outcome.status is Status.COMPLETED:
            assert outcome.first_token is not None
            assert outcome.completion is not None
            assert outcome.arrival < outcome.first_token <= outcome.completion
            assert outcome.output_tokens == min(request.output_tokens, max(1, request.max_output_tokens))
            assert 0 <= outcome.cached_tokens < request.prompt_tokens
            assert sum(outcome.tier_tokens.values()) <= outcome.cached_tokens
            if not outcome.preemptions and not outcome.retries:
                assert outcome.prefilled_tokens == request.prompt_tokens - outcome.cached_tokens
    ran.check_idle()


@settings(max_examples=150, deadline=None)
@given(WORKLOADS, set_ups(), st.sampled_from([None, 3.0]))
@example(mixed_requests(1, 17), FAILS_WITHIN_A_RUN, None)
def test_steps_taken_together_change_nothing(requests: list[Any], how: dict[str, Any], stop_at: float | None) -> None:
    together, singly = (run(requests, **how, stop_at=stop_at, together=each) for each in (True, False))
    assert csv_of(together) == csv_of(singly)
    assert together.ending == singly.ending
    assert together.simulator.series == singly.simulator.series
    for ours, theirs in zip(together.simulator.replicas, singly.simulator.replicas, strict=True):
        assert (ours.stats, ours.busy) == (theirs.stats, theirs.busy)
        assert ours.pool.cached_hashes() == theirs.pool.cached_hashes()
        assert [block.block_hash for block in ours.pool.blocks] == [block.block_hash for block in theirs.pool.blocks]


@settings(max_examples=40, deadline=None)
@given(WORKLOADS, set_ups())
def test_the_same_seed_gives_the_same_bytes(requests: list[Any], how: dict[str, Any]) -> None:
    assert csv_of(run(requests, **how)) == csv_of(run(requests, **how))


@settings(max_examples=60, deadline=None)
@given(WORKLOADS, set_ups())
def test_the_cache_never_changes_what_is_generated(requests: list[Any], how: dict[str, Any]) -> None:
    how = {**how, "random_outages": None}
    cached, cold = (run(requests, **how, prefix_caching=each) for each in (True, False))
    assert {name: (each.status, each.output_tokens) for name, each in cached.outcomes.items()} == {
        name: (each.status, each.output_tokens) for name, each in cold.outcomes.items()
    }
    assert all(each.cached_tokens == 0 for each in cold.outcomes.values())


@settings(max_examples=40, deadline=None)
@given(WORKLOADS, set_ups(), st.integers(1, 3))
def test_those_that_never_fit_do_not_stop_the_rest(requests: list[Any], how: dict[str, Any], seed: int) -> None:
    rng = Random(seed)
    how = {**how, "random_outages": None}
    capacity = how["kv_blocks"] * how["block_size"]
    fit = [request for request in requests if rng.random() < 0.5]
    ran = run(fit, **how)
    for request in fit:
        total = request.prompt_tokens + max(1, request.max_output_tokens)
        rejected = request.prompt_tokens == 0 or total > capacity
        assert (ran.outcomes[request.request_id].status is Status.REJECTED) == rejected
