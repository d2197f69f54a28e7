"""What the byte cache holds, and what it tells of it."""

import pytest

from emberkv import InMemoryKVCacheManager
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import EntryError
from emberkv.tiers.byte_cache import MB
from tests.tiers.harness import Clock, cache_of, held, used


def test_what_is_set_is_got_without_a_copy() -> None:
    cache = InMemoryKVCacheManager()
    value = b"some bytes"
    cache.set("key", value)
    assert cache.get("key") is value
    assert cache.get("other") is None


@pytest.mark.parametrize(
    "key", ["a:b/c", "tab\there\nand there", "käse", "鍵", "🔑", "\0", " ", "e\u0301", "\U0010ffff"]
)
def test_any_unicode_text_is_a_key(key: str) -> None:
    cache = InMemoryKVCacheManager(1)
    cache.set(key, b"value")
    metadata = cache.get_metadata(key)
    assert cache.get(key) == b"value"
    assert metadata is not None
    assert metadata["key_size_bytes"] == len(key.encode())


def test_keys_that_look_alike_are_different_keys() -> None:
    cache = InMemoryKVCacheManager(1)
    keys = [f"prefix:{index:04}" for index in range(1000)] + ["é", "e\u0301"]
    for key in keys:
        cache.set(key, key.encode())
    assert [cache.get(key) for key in keys] == [key.encode() for key in keys]
    assert cache.get_stats()["total_entries"] == 1002


def test_an_empty_value_is_a_value() -> None:
    cache = InMemoryKVCacheManager(1)
    cache.set("key", b"")
    assert cache.get("key") == b""
    assert cache.get_stats()["cache_hits"] == 1
    assert used(cache) == 3


def test_values_of_50_mb() -> None:
    cache = InMemoryKVCacheManager(101)
    values = {key: key.encode() * (50 * MB) for key in "ab"}
    for key, value in values.items():
        cache.set(key, value)
    assert all(cache.get(key) is value for key, value in values.items())
    cache.set("c", values["a"])
    assert held(cache, "abc") == "bc"


def test_an_overwrite_is_an_entry_anew() -> None:
    clock = Clock()
    cache = InMemoryKVCacheManager(1, clock=clock)
    cache.set("a", b"old", prefix_tokens=7)
    cache.get("a")
    clock.now = 5.0
    cache.set("a", b"newer")
    metadata = cache.get_metadata("a")
    assert metadata is not None
    assert (metadata["timestamp"], metadata["access_count"], metadata["prefix_tokens"]) == (5.0, 0, None)


def test_delete_says_whether_there_was_something() -> None:
    cache = cache_of(20)
    cache.set("a", bytes(9))
    assert [cache.delete("a"), cache.delete("a"), cache.delete("")] == [True, False, False]
    assert cache.get("a") is None
    assert used(cache) == 0
    assert cache.get_stats()["evictions"] == 0


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_clear_drops_entries_and_statistics(policy: str) -> None:
    cache = cache_of(20, policy)
    for key in "abc":
        cache.set(key, bytes(9))
        cache.get(key)
    cache.get("absent")
    cache.clear()
    assert cache.get_stats() == cache_of(20).get_stats()
    assert cache.get_metadata("c") is None
    for key in "cde":
        cache.set(key, bytes(9))
    assert held(cache, "cde") == "de"


def test_metadata() -> None:
    clock = Clock(100.0)
    cache = InMemoryKVCacheManager(4, clock=clock)
    cache.set("käse", bytes(MB - 5), prefix_tokens=512)
    clock.now = 130.0
    assert cache.get_metadata("käse") == {
        "timestamp": 100.0,
        "size_mb": 1.0,
        "access_count": 0,
        "prefix_tokens": 512,
        "key_size_bytes": 5,
        "value_size_bytes": MB - 5,
        "entry_size_bytes": MB,
    }
    cache.get("käse")
    clock.now = 150.0
    cache.get("käse")
    clock.now = 170.0
    metadata = cache.get_metadata("käse")
    assert metadata is not None
    assert (metadata["timestamp"], metadata["access_count"]) == (150.0, 2)
    assert cache.get_metadata("absent") is None
    assert cache.get_metadata("") is None


def test_metadata_is_a_copy() -> None:
    cache = InMemoryKVCacheManager(1)
    cache.set("a", b"value")
    metadata = cache.get_metadata("a")
    assert metadata is not None
    metadata["access_count"] = 99
    again = cache.get_metadata("a")
    assert again is not None
    assert again["access_count"] == 0


def test_statistics() -> None:
    cache = InMemoryKVCacheManager(4)
    assert cache.get_stats()["hit_rate"] == 0.0
    cache.set("ab", bytes(MB))
    cache.set("c", bytes(MB // 2))
    for key in ("ab", "c", "ab", "absent"):
        cache.get(key)
    assert cache.get_stats() == {
        "total_entries": 2,
        "memory_used_mb": 1.5 + 3 / MB,
        "key_memory_mb": 3 / MB,
        "value_memory_mb": 1.5,
        "cache_hits": 3,
        "cache_misses": 1,
        "hit_rate": 0.75,
        "evictions": 0,
    }


@pytest.mark.parametrize("key", [None, ""])
def test_an_empty_key_is_never_found_and_never_counted(key: str) -> None:
    cache = InMemoryKVCacheManager(1)
    assert cache.get(key) is None
    assert cache.get_stats()["cache_misses"] == 0


def test_it_is_a_mapping_from_keys_to_values() -> None:
    cache = cache_of(20)
    assert not cache
    cache["a"] = b"first"
    cache["b"] = b"second"
    assert (cache["a"], len(cache), list(cache), "a" in cache, "c" in cache) == (b"first", 2, ["a", "b"], True, False)
    del cache["a"]
    assert (list(cache), cache.get("a")) == (["b"], None)
    for key in ("a", ""):
        with pytest.raises(KeyError, match=repr(key)):
            cache[key]
        with pytest.raises(KeyError, match=repr(key)):
            del cache[key]


def test_a_subscript_is_an_access_and_a_membership_test_is_none() -> None:
    cache = cache_of(20)
    for key in "ab":
        cache[key] = bytes(9)
    assert cache["a"] == bytes(9)
    assert "b" in cache
    cache["c"] = bytes(9)
    assert (list(cache), cache.get_stats()["cache_hits"]) == (["a", "c"], 1)


def test_iteration_is_over_the_keys_at_its_beginning() -> None:
    cache = cache_of(20)
    for key in "abc":
        cache[key] = b"."
    seen = []
    for key in cache:
        seen.append(key)
        cache.clear()
        cache["new"] = b"."
    assert seen == ["a", "b", "c"]


def test_a_refused_assignment_raises_what_set_raises() -> None:
    cache = cache_of(20)
    with pytest.raises(EntryError, match="exceeds cache limit"):
        cache["a"] = bytes(20)
    assert "a" not in cache
