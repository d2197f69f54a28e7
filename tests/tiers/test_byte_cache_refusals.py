"""What the byte cache refuses, and in which words."""

import math

import pytest

from emberkv import InMemoryKVCacheManager
from emberkv.errors import ConfigError, EmberError, EntryError, EntryTypeError
from emberkv.tiers.byte_cache import MB
from tests.tiers.harness import used


@pytest.mark.parametrize("size", [0, -1, -0.5, math.nan, math.inf, 1e308])
def test_a_size_must_be_a_finite_number_above_0(size: float) -> None:
    with pytest.raises(ConfigError, match=r"max_memory_mb is .*; it must be a finite number above 0") as caught:
        InMemoryKVCacheManager(size)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'mru' is unknown; use one of lru, .*greedy-dual"):
        InMemoryKVCacheManager(1, "mru")


def test_a_size_may_be_a_fraction() -> None:
    cache = InMemoryKVCacheManager(0.5)
    cache.set("k", bytes(MB // 2 - 1))
    assert used(cache) == MB // 2
    with pytest.raises(EntryError, match="524,289 bytes, key included, exceeds cache limit of 524,288 bytes"):
        cache.set("k", bytes(MB // 2))


@pytest.mark.parametrize("key", [None, ""])
def test_a_key_must_be_there(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be None or empty"):
        InMemoryKVCacheManager(1).set(key, b"value")


@pytest.mark.parametrize("key", ["a" * 10_241, "é" * 5_121, "🔑" * 2_561])
def test_a_key_over_10_240_bytes_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"exceeds maximum of 10,240 \(10KB\)"):
        InMemoryKVCacheManager(1).set(key, b"value")


@pytest.mark.parametrize("key", ["a" * 10_000, "a" * 10_240, "é" * 5_120, "🔑" * 2_560])
def test_a_key_of_10_240_bytes_is_fine(key: str) -> None:
    cache = InMemoryKVCacheManager(1)
    cache.set(key, b"value")
    assert cache.get(key) == b"value"


def test_a_key_with_a_lone_surrogate_is_refused() -> None:
    cache = InMemoryKVCacheManager(1)
    with pytest.raises(EntryError, match="lone surrogate at 3"):
        cache.set("key\ud800", b"value")
    assert cache.get("key\ud800") is None


@pytest.mark.parametrize("value", [None])
def test_a_value_of_none_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="value is None"):
        InMemoryKVCacheManager(1).set("key", value)


@pytest.mark.parametrize(
    ("value", "name"), [("text", "str"), (bytearray(b"b"), "bytearray"), (memoryview(b"m"), "memoryview"), (1, "int")]
)
def test_a_value_must_be_bytes(value: bytes, name: str) -> None:
    with pytest.raises(EntryTypeError, match=f"value is of type {name}; it must be bytes") as caught:
        InMemoryKVCacheManager(1).set("key", value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(("key", "name"), [(b"key", "bytes"), (7, "int"), (("a", "b"), "tuple")])
def test_a_key_must_be_text(key: str, name: str) -> None:
    with pytest.raises(EntryTypeError, match=f"key is of type {name}; it must be str"):
        InMemoryKVCacheManager(1).set(key, b"value")


def test_every_refusal_is_one_of_our_errors() -> None:
    assert all(issubclass(error, EmberError) for error in (ConfigError, EntryError, EntryTypeError))
