"""The recommendation: every number in it is the plan's."""

from dataclasses import replace

from emberkv.sim.config import Targets
from emberkv.sim.plan import SimulationFigures, get_this, recommendation
from emberkv.sim.summary import OfferedLoad
from tests.sim.plan.build import CHOSEN, PLAN, SIZES, plan


def test_it_says_what_to_get_and_why() -> None:
    assert recommendation(PLAN) == [
        "Of all prompt tokens, 30.0% can be reused: that is what a cache without limit finds.",
        "4 GiB captures 100% of what is reusable; beyond 3.5 GiB nothing changes.",
        "A policy that knew the future would need 2 GiB for as much; LRU needs the rest because it cannot.",
        "Fetching a prompt token from RAM takes 2 us, 10.0 times as fast as computing it (20 us).",
        "Fetching a prompt token from disk takes 40 us, slower than computing it (20 us).",
        "The workload asks for 2 requests a second, 5 at its busiest.",
        "From 2 to 3 replicas were tried, beginning with as many as have 20% of what they could serve to spare by "
        "formula.",
    ]  # fmt: skip


def test_a_sampled_curve_says_so_and_does_not_promise_where_nothing_changes() -> None:
    words = recommendation(plan(eviction="lfu", error=0.0071))
    assert words[1] == "4 GiB captures 100% of what is reusable (from a sample; at most about 0.007 off)."


def test_without_a_size_that_is_enough_it_says_what_the_largest_does() -> None:
    words = recommendation(plan(recommended_size=None, sizes=SIZES[:2]))
    assert words[1] == "No size captures 90% of that; 2 GiB captures 67%."


def test_where_nothing_is_told_or_shared_it_promises_nothing() -> None:
    untold = recommendation(plan(content_known=False, unlimited=0.0, recommended_size=None, set_ups=PLAN.set_ups[-1:]))
    assert untold[0].startswith("The workload does not say what prompts share")
    assert recommendation(plan(unlimited=0.0, recommended_size=None))[0].startswith("No two prompts begin alike")


def test_what_to_get_comes_with_its_price_and_the_reasons() -> None:
    less = replace(
        CHOSEN,
        replicas=1,
        simulated=SimulationFigures(900, 0, 0.2, 9.0, 30.0, 0.1, 1.0, OfferedLoad(2.0, 1.0, 400, True, 2)),
    )
    found = get_this(plan(price_per_hour=1.5, slo=Targets(ttft_ms=3000.0), set_ups=[less, *PLAN.set_ups]))
    assert found == [
        "Get 2 replicas on 4 x card, with 1 GiB of KV memory and 2 GiB of RAM for the cache each: $6.00 an hour.",
        "It is the smallest of the set-ups simulated that keeps time to first token p99 within 3 s: 28.0% of prompt "
        "tokens found, mean time to first token 400 ms, p99 2.5 s.",
        "This is judged by the first 900 of 1,000 requests; --requests takes more.",
        "Not 1 replica on 2 x card, with 1 GiB of KV memory and 2 GiB of RAM for the cache: it serves 1 of 2 requests "
        "a second and the queue grows without end.",
    ]


def test_without_a_price_it_says_how_to_give_one() -> None:
    assert "No price is known: --price-per-hour takes that of one device." in get_this(PLAN)


def test_where_nothing_serves_it_says_what_fails() -> None:
    slow = replace(CHOSEN, simulated=replace(CHOSEN.simulated, missed=("ttft_ms",)))
    assert get_this(plan(get=None, set_ups=[slow])) == [
        "No set-up tried serves this workload. The largest, 2 replicas on 4 x card, with 1 GiB of KV memory and 2 GiB "
        "of RAM for the cache each: its p99 misses the time to first token (2.5 s).",
        "This is judged by the first 900 of 1,000 requests; --requests takes more.",
    ]


def test_a_plan_of_all_requests_does_not_speak_of_the_first() -> None:
    assert not [sentence for sentence in get_this(plan(simulated_requests=1000)) if "judged" in sentence]
    assert not [sentence for sentence in get_this(plan(simulated_requests=1000, stop_at=700.0)) if "judged" in sentence]


def test_a_plan_that_the_set_up_s_own_stop_ends_does_not_ask_for_more_requests() -> None:
    words = get_this(plan(stop_at=450.0))
    assert "This is judged by the first 900 of 1,000 requests, up to stop_at, 450 s." in words
    assert not [sentence for sentence in words if "--requests" in sentence]
