"""Each policy against its naive model, over random operations."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.eviction import FIFO, LFU, LRU, POLICY_NAMES, GreedyDual
from emberkv.core.eviction_policy import EvictionPolicy, Weight
from emberkv.core.s3fifo import S3FIFO
from tests.core.naive_policies import NaiveRanked, NaiveS3FIFO

REAL: dict[str, Callable[[], EvictionPolicy[int]]] = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "s3fifo": S3FIFO,
    "greedy-dual": GreedyDual,
}
NAIVE: dict[str, Callable[[], NaiveRanked | NaiveS3FIFO]] = {
    "lru": lambda: NaiveRanked(lambda entry, age: 0.0),
    "lfu": lambda: NaiveRanked(lambda entry, age: entry.count),
    "fifo": lambda: NaiveRanked(lambda entry, age: entry.born),
    "s3fifo": NaiveS3FIFO,
    "greedy-dual": lambda: NaiveRanked(lambda entry, age: age + entry.count * entry.weight.cost / entry.weight.size),
}
VERBS = ("admit", "admit", "release", "release", "release", "hold", "access", "access", "evict", "discard", "forget")


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(operations=st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 11)), max_size=120))
def test_a_policy_does_what_its_naive_model_does(name: str, operations: list[tuple[str, int]]) -> None:
    policy, naive = REAL[name](), NAIVE[name]()
    held: set[int] = set()
    released: set[int] = set()
    for verb, key in operations:
        if verb == "admit" and key not in held | released:
            weight = Weight(size=1 + key % 3, cost=1 + key % 5)
            policy.admit(key, weight)
            naive.admit(key, weight)
            held.add(key)
        elif verb == "release" and key in held:
            policy.release([key])
            naive.release(key)
            held.remove(key)
            released.add(key)
        elif verb == "hold" and key in released:
            policy.hold([key])
            naive.hold(key)
            released.remove(key)
            held.add(key)
        elif verb == "access" and key in held | released:
            policy.access([key])
            naive.access(key)
        elif verb == "evict" and released:
            victim = policy.evict()
            assert victim == naive.evict()
            released.remove(victim)
        elif verb == "discard" and key in released:
            policy.discard(key)
            naive.remove(key)
            released.remove(key)
        elif verb == "forget" and key in held:
            policy.forget(key)
            naive.remove(key)
            held.remove(key)
        assert len(policy) == len(released)
    assert {naive.evict() for _ in range(len(released))} == released
