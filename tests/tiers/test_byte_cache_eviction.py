"""When the byte cache evicts, which entries, and what it does not evict."""

import pytest

from emberkv import InMemoryKVCacheManager
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.tiers.byte_cache import MB
from tests.tiers.harness import cache_of, held, used


@pytest.mark.parametrize("key", ["a", "new"])
def test_an_entry_over_the_limit_changes_nothing(key: str) -> None:
    cache = cache_of(20)
    for each in "ab":
        cache.set(each, bytes(9))
    before = cache.get_stats()
    with pytest.raises(ValueError, match="exceeds cache limit of 20 bytes"):
        cache.set(key, bytes(20))
    assert cache.get_stats() == before
    assert cache.get("a") == bytes(9)


def test_an_entry_of_just_the_limit_fits() -> None:
    cache = cache_of(20)
    cache.set("k", bytes(19))
    assert used(cache) == 20


def test_five_values_of_10_mb_do_not_fit_in_50() -> None:
    cache = InMemoryKVCacheManager(50)
    value = bytes(10 * MB)
    for key in "abcde":
        cache.set(key, value)
    assert held(cache, "abcde") == "bcde"
    stats = cache.get_stats()
    assert (stats["total_entries"], stats["evictions"]) == (4, 1)
    assert stats["value_memory_mb"] == 40


def test_as_many_are_evicted_as_it_takes() -> None:
    cache = cache_of(40)
    for key in "abcd":
        cache.set(key, bytes(9))
    cache.set("e", bytes(20))
    assert held(cache, "abcde") == "de"
    assert cache.get_stats()["evictions"] == 3
    assert used(cache) == 31


def test_lru_is_recency_of_reading_too() -> None:
    cache = cache_of(30)
    for key in "abc":
        cache.set(key, bytes(9))
    cache.get("a")
    cache.set("d", bytes(9))
    assert held(cache, "abcd") == "acd"
    cache.get("c")
    cache.get("a")
    cache.set("e", bytes(9))
    assert held(cache, "abcde") == "ace"


def test_the_order_of_a_thousand_reads_is_kept() -> None:
    cache = cache_of(30)
    for key in "abc":
        cache.set(key, bytes(9))
    for key in "bca" * 333 + "c":
        cache.get(key)
    cache.set("d", bytes(9))
    assert held(cache, "abcd") == "acd"


def test_looking_at_metadata_or_missing_is_no_access() -> None:
    cache = cache_of(20)
    for key in "ab":
        cache.set(key, bytes(9))
    cache.get_metadata("a")
    cache.get("absent")
    cache.set("c", bytes(9))
    assert held(cache, "abc") == "bc"
    assert cache.get_stats()["cache_hits"] == 0


@pytest.mark.parametrize(("policy", "left"), [("lru", "adef"), ("lfu", "abdf"), ("fifo", "cdef"), ("s3fifo", "bcdf")])
def test_each_policy_evicts_by_its_own_order(policy: str, left: str) -> None:
    """Six entries of 10 bytes come to a cache of 40; b is read most, a last."""
    cache = cache_of(40, policy)
    for key in "abcd":
        cache.set(key, bytes(9))
    for key in "bbbbcda":
        cache.get(key)
    for key in "ef":
        cache.set(key, bytes(9))
    assert held(cache, "abcdef") == left


def test_greedy_dual_lets_the_large_go_first() -> None:
    cache = cache_of(40, "greedy-dual")
    for key, size in (("a", 5), ("b", 20), ("c", 5)):
        cache.set(key, bytes(size - 1))
    cache.set("d", bytes(14))
    assert held(cache, "abcd") == "acd"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_overwriting_replaces_and_evicts_nobody_needlessly(policy: str) -> None:
    cache = cache_of(30, policy)
    for key in "abc":
        cache.set(key, bytes(9))
    cache.set("a", b"different")
    cache.set("b", b"shorter")
    stats = cache.get_stats()
    assert [cache.get(key) for key in "abc"] == [b"different", b"shorter", bytes(9)]
    assert (stats["total_entries"], stats["evictions"]) == (3, 0)
    assert used(cache) == 28


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_an_overwrite_that_grows_evicts_others_only(policy: str) -> None:
    cache = cache_of(30, policy)
    for key in "abc":
        cache.set(key, bytes(9))
    for key in "bc":
        cache.get(key)
    cache.set("a", bytes(29))
    assert held(cache, "abc") == "a"
    assert cache.get_stats()["evictions"] == 2
    assert used(cache) == 30


def test_the_old_value_can_be_read_until_the_new_one_is_there() -> None:
    seen: list[bytes | None] = []
    watching = False

    def clock() -> float:
        """Looks while a set is under way: it asks for the time with the lock held."""
        nonlocal watching
        if watching:
            watching = False
            seen.append(cache.get("a"))
        return 0.0

    cache = InMemoryKVCacheManager(30 / MB, clock=clock)
    for key in "abc":
        cache.set(key, bytes(9))
    watching = True
    cache.set("a", bytes(19))
    assert seen == [bytes(9)]
    assert held(cache, "abc") == "ac"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_deleted_entry_makes_room_and_may_come_back(policy: str) -> None:
    cache = cache_of(20, policy)
    for key in "ab":
        cache.set(key, bytes(9))
    cache.get("a")
    cache.delete("a")
    cache.set("c", bytes(9))
    cache.set("a", bytes(9))
    assert held(cache, "abc") == "ac"
