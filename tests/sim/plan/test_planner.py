"""The plan as a whole: its parts agree with each other and with the simulator."""

from dataclasses import replace

import pytest

from emberkv.errors import WorkloadError
from emberkv.sim.config import SimulationConfig
from emberkv.sim.planner import UTILISED, Planner
from emberkv.sim.run import simulate
from tests.sim.plan.build import chats, rates

GPU = SimulationConfig(model="qwen2.5-0.5b", hardware="l40s", kv_blocks=40, block_size=16)
"""A pool so small that lower tiers matter."""


def test_as_many_replicas_as_the_busiest_time_needs_with_room_to_spare() -> None:
    plan = Planner(chats(), rates()).plan()
    point = plan.set_ups[-1]
    assert point.replicas > 1
    assert plan.demand.busiest is not None
    assert UTILISED * point.most_requests_per_second >= plan.demand.busiest
    fewer = Planner(chats(), rates()).plan(replicas=point.replicas - 1).set_ups[-1]
    assert UTILISED * fewer.most_requests_per_second < plan.demand.busiest


def test_the_recommended_size_is_the_first_that_captures_what_is_wanted() -> None:
    for wanted in (0.5, 0.9, 1.0):
        plan = Planner(chats(), rates(), wanted=wanted).plan()
        assert plan.recommended is not None
        smaller = [point for point in plan.sizes if point.bytes < plan.recommended.bytes]
        assert plan.recommended.hit_rate >= wanted * plan.unlimited
        assert all(point.hit_rate < wanted * plan.unlimited for point in smaller)
        assert plan.sizes[-1].hit_rate == pytest.approx(plan.unlimited)


def test_lower_tiers_are_planned_where_they_hold_more_than_the_pools() -> None:
    plan = Planner(chats(), GPU).plan(replicas=1)
    bare, *tiered = plan.set_ups
    assert (bare.replicas, bare.tier) == (1, None)
    assert {point.tier for point in tiered} == {"ram", "disk"}
    for point in tiered:
        assert point.tier_bytes > plan.pool_bytes
        assert point.hit_rate > bare.hit_rate
        assert point.first_token <= bare.first_token


def test_only_a_few_set_ups_are_simulated_and_as_the_simulator_would() -> None:
    told: list[str] = []
    plan = Planner(chats(), GPU).plan(replicas=1, simulating=told.append)
    assert told == ["replicas: 1, lower tier: none", "replicas: 1, lower tier: ram"]
    bare, *tiered = plan.set_ups
    expected = simulate(GPU, chats()).summary
    assert bare.simulated is not None
    assert bare.simulated.hit_rate == expected["prefix_caching"]["overall_hit_rate"]
    assert bare.simulated.mean_ttft == expected["ttft_ms"]["mean"] / 1e3
    with_ram = [point for point in tiered if point.simulated]
    assert [point.tier for point in with_ram] == ["ram"]
    assert with_ram[0].simulated is not None
    assert with_ram[0].simulated.hit_rate > bare.simulated.hit_rate


def test_a_simulated_hit_rate_is_near_the_curves_where_a_pool_is_larger_than_what_runs() -> None:
    config = GPU.model_copy(update={"kv_blocks": 400})
    (point, *_) = Planner(chats(), config).plan(replicas=1, simulating=lambda _: None).set_ups
    assert point.simulated is not None
    assert point.simulated.hit_rate == pytest.approx(point.hit_rate, abs=0.05)


def test_routing_is_by_beginning_unless_said_otherwise() -> None:
    assert Planner(chats(), rates()).plan().routing == "consistent-hashing"
    assert Planner(chats(), rates(routing="random")).plan().routing == "random"


def test_a_workload_that_shares_nothing_has_no_recommended_size() -> None:
    workload = chats(sessions=5)
    assert workload.generated is not None
    single = workload.generated.clients[0].model_copy(
        update={"turns": workload.generated.clients[0].turns.model_copy(update={"value": 1})}
    )
    alone = replace(workload, generated=workload.generated.model_copy(update={"clients": [single]}))
    plan = Planner(alone, rates()).plan()
    assert (plan.unlimited, plan.recommended, plan.told) == (0, None, True)


def test_a_workload_without_requests_is_refused() -> None:
    workload = chats()
    assert workload.generated is not None
    generated = workload.generated.model_copy(update={"sessions": 0})
    with pytest.raises(WorkloadError, match="no requests"):
        Planner(replace(workload, generated=generated), rates())
