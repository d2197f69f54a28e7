"""The plan as a whole: its parts agree with each other and with the simulator."""

from dataclasses import replace

import pytest

from emberkv.errors import WorkloadError
from emberkv.sim.config import ModelledTierConfig, OutageConfig, SimulationConfig, Targets, with_changes
from emberkv.sim.curves import first_requests
from emberkv.sim.formatting import format_size
from emberkv.sim.plan import MAX_UTILISATION, get_this
from emberkv.sim.planner import Planner
from emberkv.sim.run import run_simulation
from tests.sim.plan.build import chats, rates

GPU = SimulationConfig(model="qwen2.5-0.5b", hardware="l40s", kv_blocks=40, block_size=16)
"""A pool so small that lower tiers matter."""

RAM = 128 * 2**20
"""The size recommended for the chats."""


def test_as_many_replicas_as_the_busiest_time_needs_with_room_to_spare() -> None:
    plan = Planner(chats(), rates()).plan(simulate=False)
    point = plan.set_ups[-1]
    assert point.replicas > 1
    assert plan.demand.busiest is not None
    assert MAX_UTILISATION * point.most_requests_per_second >= plan.demand.busiest
    fewer = Planner(chats(), rates()).plan(replicas=point.replicas - 1, simulate=False).set_ups[-1]
    assert MAX_UTILISATION * fewer.most_requests_per_second < plan.demand.busiest


def test_the_recommended_size_is_the_first_that_captures_what_is_wanted() -> None:
    for wanted in (0.5, 0.9, 1.0):
        plan = Planner(chats(), rates(), wanted=wanted).plan(simulate=False)
        assert plan.recommended_size is not None
        smaller = [point for point in plan.sizes if point.bytes < plan.recommended_size.bytes]
        assert plan.recommended_size.hit_rate >= wanted * plan.unlimited
        assert all(point.hit_rate < wanted * plan.unlimited for point in smaller)
        assert plan.sizes[-1].hit_rate == pytest.approx(plan.unlimited)


def test_lower_tiers_are_planned_where_they_hold_more_than_the_pools() -> None:
    plan = Planner(chats(), GPU).plan(replicas=1, simulate=False)
    bare, *tiered = plan.set_ups
    assert (bare.replicas, bare.tier) == (1, None)
    assert {point.tier for point in tiered} == {"ram", "disk"}
    for point in tiered:
        assert point.tier_bytes > plan.pool_bytes
        assert point.hit_rate > bare.hit_rate
        assert point.first_token <= bare.first_token


def test_gateways_and_a_shared_tier_are_simulated_and_outages_are_not_planned_for() -> None:
    shared = ModelledTierConfig(name="remote", capacity=RAM, shared=True)
    cluster = with_changes(GPU, {"gateways": 2, "tiers": [shared]})
    lost = with_changes(cluster, {"replicas": 2, "outages": [OutageConfig(replica=1, at=1.0)]})
    bare = Planner(chats(), lost).plan(replicas=1).set_ups[0]
    assert bare.simulated is not None
    assert bare.simulated.hit_rate == run_simulation(cluster, chats()).summary["prefix_caching"]["token_hit_rate"]
    assert bare.simulated.hit_rate > run_simulation(GPU, chats()).summary["prefix_caching"]["token_hit_rate"]


def test_only_a_few_set_ups_are_simulated_and_as_the_simulator_would() -> None:
    progress: list[str] = []
    plan = Planner(chats(), GPU, on_progress=progress.append).plan(replicas=1)
    simulated = [each for each in progress if each.startswith("simulating") and "requests" not in each]
    assert simulated == ["simulating 1 replica", f"simulating 1 replica with {format_size(RAM)} of RAM each"]
    bare, *tiered = plan.set_ups
    expected = run_simulation(GPU, chats()).summary
    assert bare.simulated is not None
    assert bare.simulated.hit_rate == expected["prefix_caching"]["token_hit_rate"]
    assert bare.simulated.mean_ttft == expected["ttft_ms"]["mean"] / 1e3
    with_ram = [point for point in tiered if point.simulated]
    assert [(point.tier, point.tier_bytes) for point in with_ram] == [("ram", RAM)]
    assert with_ram[0].simulated is not None
    assert with_ram[0].simulated.hit_rate > bare.simulated.hit_rate


def test_a_simulated_hit_rate_is_near_the_curves_where_a_pool_is_larger_than_what_runs() -> None:
    config = GPU.model_copy(update={"kv_blocks": 400})
    (point, *_) = Planner(chats(), config).plan(replicas=1).set_ups
    assert point.simulated is not None
    assert point.simulated.hit_rate == pytest.approx(point.hit_rate, abs=0.05)


def test_routing_is_the_default_unless_said_otherwise() -> None:
    assert Planner(chats(), rates()).plan(simulate=False).routing == "expected-ttft"
    assert Planner(chats(), rates(routing="random")).plan(simulate=False).routing == "random"


def test_a_workload_that_shares_nothing_has_no_recommended_size() -> None:
    workload = chats(sessions=5)
    assert workload.generated is not None
    single = workload.generated.clients[0].model_copy(
        update={"turns": workload.generated.clients[0].turns.model_copy(update={"value": 1})}
    )
    alone = replace(workload, generated=workload.generated.model_copy(update={"clients": [single]}))
    plan = Planner(alone, rates()).plan(simulate=False)
    assert (plan.unlimited, plan.recommended_size, plan.content_known) == (0, None, True)


def test_a_workload_without_requests_is_refused() -> None:
    workload = chats()
    assert workload.generated is not None
    generated = workload.generated.model_copy(update={"sessions": 0})
    with pytest.raises(WorkloadError, match="no requests"):
        Planner(replace(workload, generated=generated), rates())


def test_the_set_up_to_get_is_the_smallest_that_serves() -> None:
    """A replica serves about two thirds of a conversation a second; the formulas begin with more than are needed."""
    plan = Planner(chats(), rates()).plan()
    assert plan.get is not None
    ran = {point.replicas: point.simulated for point in plan.set_ups if point.simulated}
    chosen = ran[plan.get.replicas]
    fewer = ran[plan.get.replicas - 1]
    assert chosen is not None
    assert fewer is not None
    assert (chosen.serves, fewer.serves) == (True, False)
    assert fewer.load is not None
    assert fewer.load.grows


def test_a_service_level_asks_for_more_than_serving_does() -> None:
    serving = Planner(chats(), rates(routing="bounded-hashing")).plan().get
    quick = Planner(chats(), rates(routing="bounded-hashing", slo=Targets(ttft_ms=900.0))).plan().get
    assert serving is not None
    assert quick is not None
    assert quick.replicas > serving.replicas
    assert quick.simulated is not None
    assert quick.simulated.p99_ttft <= 0.9


def test_where_no_number_of_replicas_keeps_the_level_none_is_named() -> None:
    plan = Planner(chats(sessions=20), rates(slo=Targets(ttft_ms=1.0))).plan()
    assert plan.get is None
    assert all(point.simulated.missed == ("ttft_ms",) for point in plan.set_ups if point.simulated)


def test_a_warm_up_is_among_the_requests_simulated() -> None:
    found = Planner(chats(sessions=20), rates(warm_up=4.0)).plan(replicas=2)
    (figures,) = [point.simulated for point in found.set_ups if point.simulated]
    assert figures.completed < found.demand.requests  # those of the warm-up are in no result
    assert found.simulated_requests == found.demand.requests
    assert not [sentence for sentence in get_this(found) if "judged" in sentence]


def test_a_simulation_ends_with_the_requests_asked_for_or_at_stop_at_whichever_comes_first() -> None:
    def ended(stop_at: float | None, requests: int) -> tuple[int, float | None, list[str]]:
        found = Planner(chats(sessions=20), rates(stop_at=stop_at), simulated=requests).plan(replicas=2)
        return found.simulated_requests, found.stop_at, [words for words in get_this(found) if "judged" in words]

    arrivals = [request.arrival_time for request in first_requests(chats(sessions=20).source())]
    stop_at = (arrivals[29] + arrivals[30]) / 2
    assert ended(None, 25) == (25, None, ["This is judged by the first 25 of 60 requests; --requests takes more."])
    assert ended(stop_at, 25) == ended(None, 25)
    assert ended(stop_at, 45) == (
        30, stop_at, [f"This is judged by the first 30 of 60 requests, up to stop_at, {stop_at:g} s."],
    )  # fmt: skip
    assert ended(stop_at, 60) == ended(stop_at, 45)


def test_without_a_simulation_the_formulas_choose() -> None:
    plan = Planner(chats(), rates()).plan(simulate=False, price_per_hour=2.5)
    assert plan.get == plan.set_ups[0]
    assert (plan.get.simulated, plan.price_per_hour) == (None, 2.5)
