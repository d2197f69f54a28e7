"""Floors that hold against floods, quotas that bind, and the order between owners."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.policies.eviction import LRU, EntryCost
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.policies.retention import Retaining
from emberkv.errors import ConfigError


class Cache:
    """A cache of ``capacity`` bytes as pool and tiers keep one; keys are (owner, number)."""

    def __init__(self, capacity: int, shares: dict[str, Share], default: Share | None = None) -> None:
        self.policy: FairShares[tuple[str, int]] = FairShares(LRU, shares, default or Share())
        self.capacity = capacity
        self.sizes: dict[tuple[str, int], int] = {}
        self.admitted = 0

    def used(self, owner: str) -> int:
        return sum(size for (name, _), size in self.sizes.items() if name == owner)

    def add(self, owner: str, size: int = 1, *, hold: bool = False) -> bool:
        """Whether there was room, after evicting."""
        while sum(self.sizes.values()) + size > self.capacity:
            if not self.policy.available_to(owner):
                return False
            del self.sizes[self.policy.evict_for(owner)]
        self.admitted += 1
        key = (owner, self.admitted)
        self.policy.admit(key, EntryCost(size=size, owner=owner))
        self.sizes[key] = size
        if not hold:
            self.policy.release([key])
        self.drop_surplus()
        return True

    def drop_surplus(self) -> None:
        for key in self.policy.evict_surplus():
            del self.sizes[key]

    def keys(self, owner: str) -> list[tuple[str, int]]:
        return [key for key in self.sizes if key[0] == owner]


def fill(cache: Cache, owner: str, count: int) -> None:
    for _ in range(count):
        cache.add(owner)


def test_who_has_most_above_its_floor_loses_first() -> None:
    cache = Cache(20, {"rich": Share(floor_bytes=10), "poor": Share()})
    fill(cache, "rich", 12)
    fill(cache, "poor", 8)
    fill(cache, "new", 4)
    assert [cache.used(owner) for owner in ("rich", "poor", "new")] == [12, 4, 4]


def test_an_owner_at_its_floor_loses_nothing_while_others_have_more() -> None:
    cache = Cache(10, {"quiet": Share(floor_bytes=4)})
    fill(cache, "quiet", 4)
    first = cache.keys("quiet")
    fill(cache, "flood", 1000)
    assert cache.keys("quiet") == first
    assert cache.used("flood") == 6


def test_who_has_only_its_floor_makes_room_out_of_its_own() -> None:
    cache = Cache(10, {"a": Share(floor_bytes=5), "b": Share(floor_bytes=5)})
    fill(cache, "b", 5)
    fill(cache, "a", 5)
    theirs = cache.keys("b")
    fill(cache, "a", 5)
    assert cache.keys("b") == theirs
    assert cache.keys("a") == [("a", number) for number in range(11, 16)]


def test_held_entries_of_a_flood_leave_the_floor_alone() -> None:
    cache = Cache(10, {"quiet": Share(floor_bytes=4)})
    fill(cache, "quiet", 5)
    added = [cache.add("flood", hold=True) for _ in range(8)]
    assert added == [True] * 6 + [False] * 2
    assert cache.used("quiet") == 4


def test_within_an_owner_the_inner_policy_decides() -> None:
    cache = Cache(3, {})
    fill(cache, "a", 3)
    cache.policy.access([("a", 1)])
    cache.add("a")
    assert cache.keys("a") == [("a", 1), ("a", 3), ("a", 4)]


def test_a_quota_takes_an_owners_oldest_though_there_is_room() -> None:
    cache = Cache(100, {"small": Share(quota_bytes=3)})
    fill(cache, "small", 5)
    assert cache.keys("small") == [("small", 3), ("small", 4), ("small", 5)]


def test_a_quota_binds_as_soon_as_what_is_held_is_released() -> None:
    cache = Cache(100, {"small": Share(quota_bytes=3)})
    for _ in range(5):
        cache.add("small", hold=True)
    assert cache.used("small") == 5
    cache.policy.release(cache.keys("small"))
    cache.drop_surplus()
    assert cache.used("small") == 3


def test_owners_without_a_share_of_their_own_have_the_default_each() -> None:
    cache = Cache(100, {"named": Share(quota_bytes=5)}, default=Share(quota_bytes=2))
    for owner in ("named", "one", "two"):
        fill(cache, owner, 9)
    assert [cache.used(owner) for owner in ("named", "one", "two")] == [5, 2, 2]
    assert cache.policy.bytes_by_owner() == {"named": 5, "one": 2, "two": 2}


def test_one_release_may_list_keys_of_several_owners() -> None:
    policy: FairShares[int] = FairShares(LRU, {}, Share())
    for key, owner in enumerate("aabba"):
        policy.admit(key, EntryCost(owner=owner))
    policy.release(range(5))
    assert [policy.evict() for _ in range(5)] == [0, 1, 2, 4, 3]  # equal excess: the first by name


def test_retention_is_within_ones_own_share() -> None:
    policy: FairShares[int] = FairShares(lambda: Retaining(LRU(), max_bytes=10), {"b": Share(floor_bytes=1)}, Share())
    for key, owner in enumerate("aaab"):
        policy.admit(key, EntryCost(owner=owner))
    policy.release(range(4))
    assert policy.retain([0, 1, 3, 9], until=math.inf) == 3
    assert [policy.evict() for _ in range(4)] == [2, 1, 0, 3]


def test_expiry_and_let_go_reach_every_owner() -> None:
    policy: FairShares[int] = FairShares(lambda: Retaining(LRU(), max_bytes=10), {}, Share())
    for key, owner in enumerate("aabb"):
        policy.admit(key, EntryCost(owner=owner))
    policy.release(range(4))
    policy.retain([0, 2], until=5)
    policy.unretain([2])
    policy.expire(5)
    assert [policy.evict() for _ in range(4)] == [1, 3, 0, 2]


@pytest.mark.parametrize(("floor", "quota"), [(-1, None), (5, 4)])
def test_a_share_that_cannot_be_is_refused(floor: int, quota: int | None) -> None:
    with pytest.raises(ConfigError, match=f"at least {floor} and at most {quota} bytes; the floor must be 0 or more"):
        Share(floor, quota)


FLOORS = {"a": Share(floor_bytes=10), "b": Share(floor_bytes=6, quota_bytes=9), "c": Share(quota_bytes=12)}
OPERATIONS = st.lists(
    st.tuples(st.sampled_from("aaabcd"), st.sampled_from(["add", "add", "add", "hold", "release"]), st.integers(1, 3)),
    max_size=150,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(capacity=st.integers(24, 40), mixed=st.booleans(), operations=OPERATIONS)
def test_nobody_pushes_another_below_its_floor_and_quotas_bind(
    capacity: int, mixed: bool, operations: list[tuple[str, str, int]]
) -> None:
    cache = Cache(capacity, FLOORS)
    held: set[tuple[str, int]] = set()
    for owner, verb, number in operations:
        before = {each: cache.used(each) for each in "abcd"}
        if verb == "release":
            released = [key for key in held if key[0] == owner]
            cache.policy.release(released)
            held.difference_update(released)
            cache.drop_surplus()
        elif cache.add(owner, number if mixed else 1, hold=verb == "hold") and verb == "hold":
            held.add((owner, cache.admitted))
        for each in "abcd":
            share = FLOORS.get(each, Share())
            if each != owner:
                assert cache.used(each) >= min(before[each], share.floor_bytes)
            if share.quota_bytes is not None:
                assert cache.used(each) <= share.quota_bytes or set(cache.keys(each)) <= held
        assert sum(cache.sizes.values()) <= capacity
        assert held <= cache.sizes.keys()
