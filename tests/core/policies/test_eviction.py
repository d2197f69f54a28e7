"""One contract for all policies, and the order that each is named for."""

import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.policies.eviction import (
    FIFO,
    LFU,
    LRU,
    POLICY_NAMES,
    S3FIFO,
    EntryCost,
    EvictionPolicy,
    GreedyDual,
    make_policy,
)
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.policies.retention import Retaining
from emberkv.errors import ConfigError
from tests.machine import subclasses_core

PolicyClass = Callable[[], EvictionPolicy[int]]


def retaining(inner: PolicyClass) -> EvictionPolicy[int]:
    return Retaining(inner(), max_bytes=math.inf)


def shared(inner: PolicyClass) -> EvictionPolicy[int]:
    return FairShares(inner, {"": Share(5, 2000)}, Share())


def shared_and_retaining(inner: PolicyClass) -> EvictionPolicy[int]:
    return shared(partial(retaining, inner))


every_policy = pytest.mark.parametrize(
    "make",
    [
        *(LRU, LFU, FIFO, S3FIFO, GreedyDual),
        *(
            pytest.param(partial(wrap, inner), id=f"{wrap.__name__}-{inner.__name__}")
            for wrap in (retaining, shared, shared_and_retaining)
            for inner in (LRU, LFU, S3FIFO)
        ),
    ],
)


def filled(make: PolicyClass, count: int) -> EvictionPolicy[int]:
    """Keys 0 to count - 1, admitted and released in this order."""
    policy = make()
    for key in range(count):
        policy.admit(key, EntryCost())
    policy.release(range(count))
    return policy


def drain(policy: EvictionPolicy[int]) -> list[int]:
    return [policy.evict() for _ in range(len(policy))]


@every_policy
def test_alike_entries_go_in_order(make: PolicyClass) -> None:
    policy = filled(make, 20)
    assert len(policy) == 20
    assert drain(policy) == list(range(20))


@every_policy
def test_nothing_released_is_a_key_error(make: PolicyClass) -> None:
    policy = make()
    policy.admit(1, EntryCost())
    assert len(policy) == 0
    with pytest.raises(KeyError):
        policy.evict()


@every_policy
def test_held_keys_are_never_evicted(make: PolicyClass) -> None:
    policy = filled(make, 10)
    policy.hold([0, 3, 4])
    assert len(policy) == 7
    assert drain(policy) == [1, 2, 5, 6, 7, 8, 9]
    policy.release([4, 0, 3])
    assert set(drain(policy)) == {0, 3, 4}


@every_policy
def test_one_released_among_a_thousand_held_is_found(make: PolicyClass) -> None:
    policy = filled(make, 1000)
    policy.hold(range(1000))
    policy.access(range(1000))
    policy.release([777])
    assert drain(policy) == [777]


@every_policy
def test_many_are_evicted_as_one_by_one(make: PolicyClass) -> None:
    policies = [filled(make, 10) for _ in range(2)]
    for policy in policies:
        policy.access([2, 0, 2])
    expected = [policies[0].evict_for("") for _ in range(7)]
    assert policies[1].evict_many_for("", 7) == expected
    assert drain(policies[1]) == drain(policies[0])


@every_policy
def test_many_are_admitted_as_one_by_one(make: PolicyClass) -> None:
    one_by_one, together = filled(make, 3), filled(make, 3)
    costs = [EntryCost(cost=cost) for cost in (5.0, 1.0, 3.0)]
    for key, cost in enumerate(costs, 10):
        one_by_one.admit(key, cost)
    together.admit_many([10, 11, 12], costs)
    for policy in (one_by_one, together):
        policy.release([12, 10, 11])
    assert len(together) == 6
    assert drain(together) == drain(one_by_one)


@every_policy
def test_a_discarded_key_is_gone_and_may_come_back(make: PolicyClass) -> None:
    policy = filled(make, 3)
    policy.discard(1)
    assert len(policy) == 2
    policy.admit(1, EntryCost())
    assert drain(policy) == [0, 2]
    policy.release([1])
    assert drain(policy) == [1]


@every_policy
def test_a_forgotten_key_leaves_no_history(make: PolicyClass) -> None:
    policy = filled(make, 2)
    policy.hold([0])
    policy.access([0, 0, 0])
    policy.forget(0)
    assert drain(policy) == [1]
    policy.admit(0, EntryCost())
    policy.admit(2, EntryCost())
    policy.release([0, 2])
    assert drain(policy) == [0, 2]


@every_policy
def test_an_evicted_key_may_be_admitted_again(make: PolicyClass) -> None:
    policy = filled(make, 2)
    assert policy.evict() == 0
    policy.admit(0, EntryCost())
    policy.release([0])
    assert set(drain(policy)) == {0, 1}


def test_lru_moves_a_key_that_is_read() -> None:
    policy = filled(LRU, 3)
    policy.access([0])
    assert drain(policy) == [1, 2, 0]


def test_lru_counts_from_the_last_release() -> None:
    policy = filled(LRU, 3)
    policy.hold([0])
    policy.access([1])
    policy.release([0])
    assert drain(policy) == [2, 1, 0]


def test_lfu_evicts_the_least_used_then_the_least_recent() -> None:
    policy = filled(LFU, 4)
    policy.access([0, 0, 1, 3])
    assert drain(policy) == [2, 1, 3, 0]


def test_lfu_counts_hits_on_held_keys() -> None:
    policy = filled(LFU, 2)
    policy.hold([0])
    policy.access([0])
    policy.release([0])
    policy.access([1, 1])
    assert drain(policy) == [0, 1]


def test_fifo_ignores_use() -> None:
    policy = filled(FIFO, 3)
    policy.access([0])
    policy.hold([1])
    policy.release([1])
    assert drain(policy) == [0, 1, 2]


def test_s3fifo_passes_over_what_was_read_and_remembers_ghosts() -> None:
    policy = filled(S3FIFO, 10)
    assert policy.evict() == 0
    policy.access([1])
    assert policy.evict() == 2  # 1 was read, and moved to the main queue
    policy.admit(0, EntryCost())  # a ghost: straight to the main queue, behind 1
    policy.release([0])
    assert drain(policy) == [3, 4, 5, 6, 7, 8, 9, 0, 1]  # 1 had one more round for its hit


def test_s3fifo_keeps_a_small_queue_below_a_tenth() -> None:
    policy = filled(S3FIFO, 20)
    policy.access(range(18))
    assert policy.evict() == 18  # on the way, those that were read moved to the main queue
    assert policy.evict() == 0  # 19 alone is less than a tenth of 19: the main queue gives way, all hits used up


@subclasses_core
def test_s3fifo_looks_at_a_held_key_once() -> None:
    class Counting(S3FIFO[int]):
        passes = 0

        def _pass_main(self) -> int | None:
            self.passes += 1
            return super()._pass_main()

    policy = Counting()
    for key in range(1000):
        policy.admit(key, EntryCost())
    policy.release(range(1000))
    policy.access(range(900))
    assert policy.evict() == 900  # 0 to 899 are in the main queue now, with one round to go
    policy.hold(range(800))
    assert policy.evict() == 800
    assert policy.passes == 800 + 100 + 1
    assert policy.evict() == 801
    assert policy.passes == 800 + 100 + 2


def test_greedy_dual_weighs_cost_against_size_and_ages() -> None:
    policy: GreedyDual[str] = GreedyDual()
    policy.admit("dear", EntryCost(size=1, cost=4))  # rank 4
    policy.admit("large", EntryCost(size=4, cost=4))  # rank 1
    policy.admit("cheap", EntryCost(size=1, cost=1.5))  # rank 1.5
    for key in ("dear", "large", "cheap"):
        policy.release([key])
    assert [policy.evict(), policy.evict()] == ["large", "cheap"]  # the age is 1.5 now
    policy.admit("newer", EntryCost(size=1, cost=3))
    policy.release(["newer"])  # rank 1.5 + 3
    assert [policy.evict(), policy.evict()] == ["dear", "newer"]


@given(costs=st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=12))
def test_greedy_dual_evicts_a_chain_from_its_end_whatever_its_blocks_cost(costs: list[float]) -> None:
    policy: GreedyDual[int] = GreedyDual()
    for position, cost in enumerate(costs):
        policy.admit(position, EntryCost(cost=cost))
    from_its_end = list(reversed(range(len(costs))))
    policy.release(from_its_end)
    assert drain(policy) == from_its_end


def test_greedy_dual_multiplies_by_the_count() -> None:
    policy = filled(GreedyDual, 2)
    policy.access([0])
    policy.admit(2, EntryCost(cost=1.5))
    policy.release([2])
    assert drain(policy) == [1, 2, 0]


def test_policies_have_names() -> None:
    assert [type(make_policy(name)) for name in POLICY_NAMES] == [LRU, LFU, FIFO, S3FIFO, GreedyDual]
    with pytest.raises(ConfigError, match=r"'mru' is unknown; use one of lru, lfu, fifo, s3fifo, greedy-dual"):
        make_policy("mru")
