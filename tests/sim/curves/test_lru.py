"""LRU in one pass: equal to the pool at every capacity, and to the published figures of the Mooncake trace."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.errors import ConfigError
from emberkv.sim.curves import Access, Hits, LRUCurve, replay
from tests.sim.curves.build import CAPACITIES, visit_lists, visit_of


@settings(max_examples=300)
@given(visit_lists(), st.integers(0, 60))
def test_one_pass_tells_what_the_pool_does_at_any_capacity_that_takes_the_largest_request(
    seen: list[Access], spare: int
) -> None:
    curve = LRUCurve(seen)
    capacity = curve.smallest + spare
    assert curve.at(capacity) == replay(seen, capacity)


@given(visit_lists())
def test_more_never_hits_less_and_enough_is_as_good_as_unlimited(seen: list[Access]) -> None:
    curve = LRUCurve(seen)
    hits = [curve.at(capacity).hits for capacity in range(curve.smallest, curve.enough + 2)]
    assert hits == sorted(hits)
    assert curve.at(curve.enough).hits == curve.unlimited.hits
    if curve.enough > curve.smallest:
        assert curve.at(curve.enough - 1).hits < curve.unlimited.hits


@given(visit_lists(), st.floats(0, 1))
def test_the_capacity_for_a_share_is_the_smallest_that_has_it(seen: list[Access], share: float) -> None:
    curve = LRUCurve(seen)
    capacity = curve.capacity_for(share)
    wanted = share * curve.unlimited.hit_tokens
    assert curve.at(capacity).hit_tokens >= wanted
    if capacity > curve.smallest:
        assert curve.at(capacity - 1).hit_tokens < wanted


def test_a_loop_over_more_than_fits_loses_tails_and_keeps_heads() -> None:
    curve = LRUCurve([visit_of([root, 0]) for root in (1, 2, 3)] * 2)
    assert curve.at(5).hits == 3
    assert curve.at(6) == Hits(6, references=12, hits=6, prompt_tokens=48, hit_tokens=24)


def test_a_capacity_below_the_largest_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="ask for 3 or more"):
        LRUCurve([visit_of([1, 2, 3])]).at(2)


def test_an_empty_workload_has_an_empty_curve() -> None:
    curve = LRUCurve([])
    assert curve.unlimited == Hits(None)
    assert curve.capacity_for(0.9) == curve.enough == 1
    assert curve.at(1).token_rate == 0


def test_the_mooncake_figures(mooncake_curve: LRUCurve) -> None:
    found = (mooncake_curve.references, mooncake_curve.unique, mooncake_curve.unlimited.hits)
    assert found == (288_500, 182_790, 105_710)
    assert round(mooncake_curve.unlimited.token_rate, 4) == 0.3736
    rates = [round(mooncake_curve.at(capacity).block_rate, 4) for capacity in CAPACITIES]
    assert rates == [0.0445, 0.0653, 0.1393, 0.2116, 0.3257, 0.3546, 0.3637]
