"""The byte cache against a model that keeps its books by adding up, through random operations, under every policy."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from emberkv import InMemoryKVCacheManager
from emberkv.core.policies.eviction import POLICY_NAMES, EntryCost, EvictionPolicy, make_policy
from emberkv.tiers.byte_cache import MB

LIMIT = 60
VALUES = st.binary(max_size=15) | st.binary(max_size=LIMIT + 1)
KEYS = ("a", "b", "ccc", "dddd", "é", "鍵", "🔑🔑")


@dataclass
class Kept:
    value: bytes
    tokens: int | None
    timestamp: float
    reads: int = 0


class PlainLRU:
    """The keys in order of last use, in a list."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def used(self, key: str) -> None:
        self.order = [*(each for each in self.order if each != key), key]

    def dropped(self, key: str) -> None:
        self.order.remove(key)

    def entered(self, key: str, size: int) -> None:
        self.order.append(key)

    def victim(self) -> str:
        return self.order.pop(0)


class ReadPolicy:
    """A policy of the core, which gets each read as it happens."""

    def __init__(self, name: str) -> None:
        self.policy: EvictionPolicy[str] = make_policy(name)

    def used(self, key: str) -> None:
        self.policy.access([key])

    def dropped(self, key: str) -> None:
        self.policy.discard(key)

    def entered(self, key: str, size: int) -> None:
        self.policy.admit(key, EntryCost(size=size))
        self.policy.release([key])

    def victim(self) -> str:
        return self.policy.evict()


def size_of(key: str, value: bytes) -> int:
    return len(key.encode()) + len(value)


class CacheMachine(RuleBasedStateMachine):
    """Nothing is compared between operations unless a rule says so, as every look also settles the cache's books."""

    @initialize(policy=st.sampled_from([*POLICY_NAMES, *["lru"] * 3]))
    def start(self, policy: str) -> None:
        self.now = 0.0
        self.policy = policy
        self.cache = InMemoryKVCacheManager(LIMIT / MB, policy, clock=lambda: self.now)
        self.begin()

    def begin(self) -> None:
        self.order: PlainLRU | ReadPolicy = PlainLRU() if self.policy == "lru" else ReadPolicy(self.policy)
        self.kept: dict[str, Kept] = {}
        self.hits = self.misses = self.evictions = 0

    def bytes_kept(self) -> int:
        return sum(size_of(key, kept.value) for key, kept in self.kept.items())

    @rule(key=st.sampled_from(KEYS), value=VALUES, tokens=st.none() | st.integers(1, 99))
    def set(self, key: str, value: bytes, tokens: int | None) -> None:
        self.now += 1
        refused = False
        try:
            self.cache.set(key, value, tokens)
        except ValueError:
            refused = True
        assert refused == (size_of(key, value) > LIMIT)
        if refused:
            return
        if self.kept.pop(key, None):
            self.order.dropped(key)
        while self.bytes_kept() + size_of(key, value) > LIMIT:
            del self.kept[self.order.victim()]
            self.evictions += 1
        self.kept[key] = Kept(value, tokens, self.now)
        self.order.entered(key, size_of(key, value))

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=50))
    def get(self, keys: list[str]) -> None:
        for key in keys:
            self.now += 1
            kept = self.kept.get(key)
            assert self.cache.get(key) == (kept and kept.value)
            if kept:
                kept.reads, kept.timestamp = kept.reads + 1, self.now
                self.order.used(key)
            self.hits += kept is not None
            self.misses += kept is None

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        there = self.kept.pop(key, None) is not None
        assert self.cache.delete(key) == there
        if there:
            self.order.dropped(key)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.begin()

    @rule(key=st.sampled_from(KEYS))
    def metadata(self, key: str) -> None:
        kept = self.kept.get(key)
        size = size_of(key, kept.value) if kept else 0
        assert self.cache.get_metadata(key) == (
            kept
            and {
                "timestamp": kept.timestamp,
                "size_mb": size / MB,
                "access_count": kept.reads,
                "prefix_tokens": kept.tokens,
                "key_size_bytes": size - len(kept.value),
                "value_size_bytes": len(kept.value),
                "entry_size_bytes": size,
            }
        )

    @rule()
    def statistics(self) -> None:
        key_bytes = sum(len(key.encode()) for key in self.kept)
        assert self.cache.get_stats() == {
            "total_entries": len(self.kept),
            "memory_used_mb": self.bytes_kept() / MB,
            "key_memory_mb": key_bytes / MB,
            "value_memory_mb": (self.bytes_kept() - key_bytes) / MB,
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "hit_rate": self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0,
            "evictions": self.evictions,
        }

    def teardown(self) -> None:
        if hasattr(self, "kept"):
            self.statistics()
            assert {key for key in KEYS if self.cache.get_metadata(key)} == set(self.kept)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
