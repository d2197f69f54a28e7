"""What tests of the byte cache share: a clock to set, and looks that are no accesses."""

from dataclasses import dataclass

from emberkv import InMemoryKVCacheManager
from emberkv.tiers.byte_cache import MB


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def cache_of(limit: int, policy: str = "lru") -> InMemoryKVCacheManager:
    """A cache of ``limit`` bytes."""
    return InMemoryKVCacheManager(limit / MB, policy)


def used(cache: InMemoryKVCacheManager) -> int:
    return round(cache.get_stats()["memory_used_mb"] * MB)


def held(cache: InMemoryKVCacheManager, keys: str) -> str:
    """Which of these one-letter keys are there, without an access."""
    return "".join(key for key in keys if cache.get_metadata(key))
