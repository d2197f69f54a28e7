"""Any policy through the pool: by hand, against the published figures, and how far a sample is off."""

import pytest

from emberkv.core.policies.eviction import EntryCost
from emberkv.errors import ConfigError
from emberkv.sim.curves import Access, Hits, LRUCurve, SampledReplay, replay, sample
from tests.sim.curves.build import CAPACITIES, visit_of


def test_only_what_follows_a_prompt_without_a_gap_is_a_hit() -> None:
    seen = [visit_of([1, 2, 3]), visit_of([1, 2, 9]), visit_of([1, 5, 3])]
    assert replay(seen, 10) == Hits(10, references=9, hits=3, prompt_tokens=36, hit_tokens=12)


def test_an_answer_is_found_by_the_turn_that_goes_on_from_it_but_is_not_looked_up_itself() -> None:
    seen = [visit_of([1, 2, 3, 4], asked=2), visit_of([1, 2, 3, 4, 5])]
    assert replay(seen, 10) == Hits(10, references=7, hits=4, prompt_tokens=28, hit_tokens=16)


def test_a_request_larger_than_the_pool_is_refused_and_displaces_nothing() -> None:
    seen = [visit_of([1]), visit_of([2, 3, 4]), visit_of([1])]
    assert replay(seen, 2).hits == 1


def test_a_policy_is_told_what_a_block_is_worth() -> None:
    seen = [visit_of([2, 2]), visit_of([1]), visit_of([3]), visit_of([2, 2])]
    assert replay(seen, 3, "greedy-dual").hits == 1  # all alike: the tail goes first
    later_are_dear = replay(
        seen, 3, "greedy-dual", block_cost=lambda position: EntryCost(cost=5.0 if position else 1.0)
    )
    assert later_are_dear.hits == 2  # and with them the block before, without which they are not found


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="use one of"):
        replay([visit_of([1])], 1, "clairvoyant")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_is_no_sample_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        SampledReplay([], LRUCurve([]), share)


def test_a_sample_keeps_the_order_and_takes_a_block_always_or_never() -> None:
    seen = [visit_of([1, 2, 3, 4, 5, 6, 7, 8], asked=5)] * 2
    first, second = sample(seen, 0.5)
    assert first == second
    assert 0 < len(first.blocks) < 8
    assert [block for block in seen[0].blocks if block in first.blocks] == first.blocks
    assert first.asked == sum(1 for block in seen[0].blocks[:5] if block in first.blocks)


@pytest.mark.parametrize(("policy", "capacity", "rate"), [("lru", 6_000, 0.1393), ("lfu", 50_000, 0.3439)])
def test_the_mooncake_figures(mooncake: list[Access], policy: str, capacity: int, rate: float) -> None:
    assert round(replay(mooncake, capacity, policy).block_rate, 4) == rate


def test_a_tenth_of_the_blocks_tells_the_curve_within_the_stated_error(
    mooncake: list[Access], mooncake_curve: LRUCurve
) -> None:
    points, error = SampledReplay(mooncake, mooncake_curve, 0.1).curve(CAPACITIES, "lfu")
    assert 0 < error < 0.01
    assert [point.capacity for point in points] == list(CAPACITIES)
    published = (0.0481, 0.0750, 0.0981, 0.1317, 0.2760, 0.3439, 0.3631)
    assert max(abs(point.block_rate - rate) for point, rate in zip(points, published, strict=True)) < error
