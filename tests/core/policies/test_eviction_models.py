"""Each policy against its naive model, over random operations."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.policies.eviction import FIFO, LFU, LRU, POLICY_NAMES, S3FIFO, EntryCost, EvictionPolicy, GreedyDual
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.policies.retention import Retaining
from tests.core.naive_policies import Naive, NaiveFairShares, NaiveRanked, NaiveRetaining, NaiveS3FIFO

REAL: dict[str, Callable[[], EvictionPolicy[int]]] = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "s3fifo": S3FIFO,
    "greedy-dual": GreedyDual,
}
NAIVE: dict[str, Callable[[], Naive]] = {
    "lru": lambda: NaiveRanked(lambda entry, age: 0.0),
    "lfu": lambda: NaiveRanked(lambda entry, age: entry.count),
    "fifo": lambda: NaiveRanked(lambda entry, age: entry.born),
    "s3fifo": NaiveS3FIFO,
    "greedy-dual": lambda: NaiveRanked(lambda entry, age: age + entry.count * entry.cost.cost / entry.cost.size),
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
            cost = EntryCost(size=1 + key % 3, cost=1 + key % 5)
            policy.admit(key, cost)
            naive.admit(key, cost)
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


SHARES = {"a": Share(floor_bytes=6), "b": Share(floor_bytes=2, quota_bytes=7)}
SHARED_VERBS = (*VERBS, "retain", "retain", "let_go", "expire", "evict_for", "evict_for")


class Pair:
    """Fair shares of retaining policies and their model, driven alike."""

    def __init__(self, name: str, max_retained: float) -> None:
        self.real: FairShares[int] = FairShares(
            lambda: Retaining(REAL[name](), max_bytes=max_retained), SHARES, default=Share(quota_bytes=20)
        )
        self.naive = NaiveFairShares(
            lambda: NaiveRetaining(NAIVE[name](), max_retained), SHARES, default=Share(quota_bytes=20)
        )
        self.held: set[int] = set()
        self.released: set[int] = set()

    def do(self, verb: str, key: int, number: int) -> None:
        owner = "abc"[key % 3]
        if verb == "admit" and key not in self.held | self.released:
            cost = EntryCost(size=1 + number % 3, cost=1 + key % 5, owner=owner)
            self.real.admit(key, cost)
            self.naive.admit(key, cost)
            self.held.add(key)
        elif verb == "release" and key in self.held:
            self.real.release([key])
            self.naive.release(key)
            self.held.remove(key)
            self.released.add(key)
        elif verb == "hold" and key in self.released:
            self.real.hold([key])
            self.naive.hold(key)
            self.released.remove(key)
            self.held.add(key)
        elif verb == "access" and key in self.held | self.released:
            self.real.access([key])
            self.naive.access(key)
        else:
            self._do_more(verb, key, owner, number)

    def _do_more(self, verb: str, key: int, owner: str, number: int) -> None:
        if verb in ("evict", "evict_for") and self.released:
            victim = self.real.evict() if verb == "evict" else self.real.evict_for(owner)
            assert victim == (self.naive.evict() if verb == "evict" else self.naive.evict_for(owner))
            self.released.remove(victim)
        elif verb in ("discard", "forget") and key in (self.released if verb == "discard" else self.held):
            (self.real.discard if verb == "discard" else self.real.forget)(key)
            self.naive.remove(key)
            (self.released if verb == "discard" else self.held).remove(key)
        elif verb == "retain":
            assert self.real.retain([key], number) == self.naive.retain(key, number)
        elif verb == "let_go":
            self.real.unretain([key])
            self.naive.unretain(key)
        elif verb == "expire":
            self.real.expire(number)
            self.naive.expire(number)

    def evict_surplus(self) -> None:
        surplus = self.real.evict_surplus()
        assert set(surplus) == self.naive.surplus()
        self.released.difference_update(surplus)


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    max_retained=st.sampled_from([0, 3, 8, 100]),
    operations=st.lists(st.tuples(st.sampled_from(SHARED_VERBS), st.integers(0, 11), st.integers(0, 9)), max_size=120),
)
def test_fair_shares_of_retaining_policies_do_what_their_naive_model_does(
    name: str, max_retained: float, operations: list[tuple[str, int, int]]
) -> None:
    pair = Pair(name, max_retained)
    for verb, key, number in operations:
        pair.do(verb, key, number)
        if verb in ("admit", "release"):
            pair.evict_surplus()
        assert len(pair.real) == len(pair.released)
        for owner in "abcd":
            assert pair.real.available_to(owner) == pair.naive.available_to(owner)
            assert pair.real.bytes_by_owner().get(owner, 0) == pair.naive.bytes_of(owner)
