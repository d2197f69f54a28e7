"""Retention: a priority with an end and a cap."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.policies.eviction import LFU, LRU, EntryCost, GreedyDual
from emberkv.core.policies.retention import Retaining, RetentionBudget
from emberkv.errors import ConfigError


def filled(count: int, *, max_bytes: float = math.inf) -> Retaining[int]:
    """Keys 0 to count - 1 of one byte each, admitted and released in this order, over LRU."""
    policy: Retaining[int] = Retaining(LRU(), max_bytes=max_bytes)
    for key in range(count):
        policy.admit(key, EntryCost())
    policy.release(range(count))
    return policy


def drain(policy: Retaining[int]) -> list[int]:
    return [policy.evict() for _ in range(len(policy))]


def test_retained_keys_go_last_but_go() -> None:
    policy = filled(6)
    assert policy.retain([0, 1], until=100) == 2
    assert drain(policy) == [2, 3, 4, 5, 1, 0]  # the end of the retained chain before its beginning


def test_the_retention_that_ends_soonest_goes_first() -> None:
    policy = filled(4)
    policy.retain([0], until=math.inf)
    policy.retain([1], until=50)
    policy.retain([2], until=20)
    assert drain(policy) == [3, 2, 1, 0]


def test_expired_keys_go_in_the_order_of_all_others() -> None:
    policy = filled(4)
    policy.retain([0], until=10)
    policy.retain([1], until=11)
    policy.expire(10)
    assert not policy.is_retained(0)
    assert policy.is_retained(1)
    assert drain(policy) == [2, 3, 0, 1]  # its end counts as a release: 0 is the most recent


@pytest.mark.parametrize("ends", [lambda policy: policy.expire(10), lambda policy: policy.unretain(range(5))])
def test_a_chain_goes_from_its_end_once_its_retention_has_ended(ends: Callable[[Retaining[int]], None]) -> None:
    policy: Retaining[int] = Retaining(GreedyDual(), max_bytes=math.inf)
    for key in range(5):
        policy.admit(key, EntryCost(cost=1.0 + key))
    policy.retain(range(5), until=10)
    policy.release(reversed(range(5)))
    ends(policy)
    assert drain(policy) == [4, 3, 2, 1, 0]


def test_a_later_end_holds_against_a_sooner_one() -> None:
    policy = filled(2)
    policy.retain([0], until=100)
    policy.retain([0], until=10)
    policy.expire(99)
    assert policy.is_retained(0)
    policy.retain([0], until=200)
    policy.expire(199)
    assert policy.is_retained(0)


def test_let_go_ends_it_at_once() -> None:
    policy = filled(3)
    policy.retain([0, 1], until=math.inf)
    policy.unretain([0, 1, 7])
    assert policy.retained_bytes == 0
    assert drain(policy) == [2, 1, 0]


def test_beyond_the_cap_the_retention_that_ends_soonest_ends() -> None:
    policy = filled(5, max_bytes=2)
    policy.retain([0], until=50)
    policy.retain([1], until=10)
    assert policy.retain([2], until=30) == 1
    assert [policy.is_retained(key) for key in range(3)] == [True, False, True]
    assert policy.retain([3], until=5) == 0


def test_a_chain_too_long_for_the_cap_keeps_its_beginning() -> None:
    policy = filled(5, max_bytes=3)
    assert policy.retain(range(5), until=math.inf) == 3
    assert [policy.is_retained(key) for key in range(5)] == [True, True, True, False, False]


def test_keys_that_are_no_entries_are_passed_over() -> None:
    policy = filled(1)
    assert policy.retain([0, 8, 9], until=5) == 1


def test_a_held_key_is_retained_when_it_is_released() -> None:
    policy = filled(2)
    policy.hold([0])
    policy.retain([0], until=math.inf)
    assert drain(policy) == [1]
    policy.release([0])
    policy.admit(2, EntryCost())
    policy.release([2])
    assert drain(policy) == [2, 0]


def test_an_entry_that_goes_takes_its_retention_along() -> None:
    policy = filled(3)
    policy.retain([0, 1, 2], until=math.inf)
    policy.discard(0)
    policy.hold([1])
    policy.forget(1)
    assert policy.evict() == 2
    assert policy.retained_bytes == 0
    policy.admit(0, EntryCost())
    assert not policy.is_retained(0)


def test_use_while_retained_counts_for_the_inner_order() -> None:
    policy: Retaining[int] = Retaining(LFU(), max_bytes=9)
    for key in range(2):
        policy.admit(key, EntryCost())
    policy.release([0, 1])
    policy.retain([0], until=1)
    policy.access([0, 0])
    policy.expire(1)
    assert drain(policy) == [1, 0]


def test_a_negative_cap_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most -1 bytes are to be retained; it must be 0 or more"):
        Retaining(LRU(), max_bytes=-1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    cap=st.integers(0, 30),
    wishes=st.lists(st.tuples(st.lists(st.integers(0, 19), max_size=6), st.integers(0, 9)), max_size=20),
)
def test_the_retained_share_never_exceeds_its_cap(
    sizes: list[int], cap: int, wishes: Sequence[tuple[list[int], int]]
) -> None:
    policy: Retaining[int] = Retaining(LRU(), max_bytes=cap)
    for key, size in enumerate(sizes):
        policy.admit(key, EntryCost(size=size))
    policy.release(range(0, len(sizes), 2))  # the others stay held, and count as well
    for keys, until in wishes:
        policy.retain(keys, until)
        retained = [size for key, size in enumerate(sizes) if policy.is_retained(key)]
        assert sum(retained) == policy.retained_bytes <= cap


def test_a_budget_bounds_what_all_policies_retain_together() -> None:
    budget = RetentionBudget(6)
    policies: list[Retaining[int]] = [Retaining(LRU(), max_bytes=6, shared=budget) for _ in range(6)]
    for policy in policies:
        for key in range(6):
            policy.admit(key, EntryCost())
        policy.release(range(6))
        policy.retain(range(6), until=9)
        assert budget.retained_bytes <= 6
        assert len(policy) == 6  # what is retained no longer is evictable as before
    assert [policy.retained_bytes for policy in policies] == [1] * 6
    assert drain(policies[0])[-1] == 0  # a chain's beginning is kept longest


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cap=st.integers(0, 30),
    wishes=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 9)), max_size=20
    ),
)
def test_no_wish_of_any_owner_exceeds_the_budget_of_all(cap: int, wishes: Sequence[tuple[int, list[int], int]]) -> None:
    budget = RetentionBudget(cap)
    policies: list[Retaining[int]] = [Retaining(LRU(), max_bytes=20, shared=budget) for _ in range(4)]
    for policy in policies:
        for key in range(10):
            policy.admit(key, EntryCost(size=key + 1))
        policy.release(range(0, 10, 2))
    for owner, keys, until in wishes:
        policies[owner].retain(keys, until)
        retained = [sum(key + 1 for key in range(10) if policy.is_retained(key)) for policy in policies]
        assert retained == [policy.retained_bytes for policy in policies]
        assert sum(retained) <= cap
        assert max(retained) <= 20
