"""The public byte cache in host memory, which holds its entries to a limit of bytes.

What to evict is the policy's decision, when to is ours. Reads note what they read, and whoever next needs the books (a
set, a question about statistics, or now and then a read that finds the lock free) settles them under the lock, in the
order in which they were noted. So reads of many threads do not queue, no read is ever left uncounted, and a set sees
the recency of every read before it. This needs no more than that a dict's look-up and a deque's append are atomic,
which CPython promises with and without its global lock.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from emberkv.core.policies.eviction import make_policy
from emberkv.core.policies.eviction_policy import EvictionPolicy, Weight
from emberkv.errors import ConfigError, EntryError
from emberkv.tiers.entry_checks import check_value, key_size_of

MB = 2**20
"""Bytes."""

_MANY_NOTES = 32
"""Each so many-th read settles: many enough for the lock to cost next to nothing, few enough to be quick."""

_MAX_NOTES = 4096
"""Reads noted before one of them waits for the lock. A thread that holds it and has lost its turn gets it back then."""


class EntryMetadata(TypedDict):
    """timestamp: seconds since the epoch, of the set or the last hit. access_count: hits since the set."""

    timestamp: float
    size_mb: float
    access_count: int
    prefix_tokens: int | None
    key_size_bytes: int
    value_size_bytes: int
    entry_size_bytes: int


class CacheStats(TypedDict):
    """memory_used_mb: keys and values. hit_rate: 0 to 1, and 0 before the first read. evictions: in entries."""

    total_entries: int
    memory_used_mb: float
    key_memory_mb: float
    value_memory_mb: float
    cache_hits: int
    cache_misses: int
    hit_rate: float
    evictions: int


@dataclass(slots=True)
class _Entry:
    value: bytes
    key_size: int
    prefix_tokens: int | None
    timestamp: float
    access_count: int = 0

    @property
    def size(self) -> int:
        return self.key_size + len(self.value)


class InMemoryKVCacheManager:
    """Bytes by key, within a limit of memory, for any number of threads.

    max_memory_mb: the limit in units of 1,048,576 bytes; fractions are fine. An entry takes its value's bytes and its
    key's in UTF-8. eviction_policy: one of `emberkv.core.policies.eviction.POLICY_NAMES`; all cost O(1) an operation,
    save those that rank entries, which cost O(log n). clock: wall clock in seconds.

    Raises ConfigError, a ValueError, for an unknown policy or a size that is not a finite number above 0.
    """

    def __init__(
        self,
        max_memory_mb: float = 300_000,
        eviction_policy: str = "lru",
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        limit = max_memory_mb * MB
        if not 0 < limit < math.inf:
            raise ConfigError(f"max_memory_mb is {max_memory_mb!r}; it must be a finite number above 0")
        self._limit = int(limit)
        self._make_policy: Callable[[], EvictionPolicy[str]] = partial(make_policy, eviction_policy)
        self._clock = clock
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Drop all entries, and start the statistics and what the policy remembers anew."""
        policy = self._make_policy()
        with self._lock:
            self._policy = policy
            self._entries: dict[str, _Entry] = {}
            self._notes: deque[str | None] = deque()  # of each read in turn: the key found, or None for a miss
            self._key_bytes = self._value_bytes = 0
            self._hits = self._misses = self._evictions = 0

    def get(self, key: str) -> bytes | None:
        """The value, without a copy; None, and nothing counted, for an empty key."""
        entry = self._entries.get(key)
        notes = self._notes
        if entry is not None:
            entry.timestamp = self._clock()
            notes.append(key)
        elif key:
            notes.append(None)
        else:
            return None
        noted = len(notes)
        if not noted % _MANY_NOTES and self._lock.acquire(blocking=noted >= _MAX_NOTES):
            try:
                self._settle()
            finally:
                self._lock.release()
        return entry.value if entry is not None else None

    def set(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None:
        """Store ``value``, as a new entry also where ``key`` had one, and evict others until it fits.

        key: at most 10,240 bytes in UTF-8. prefix_tokens: how many tokens the value stands for; kept for
        `get_metadata` only. Raises EntryError, a ValueError, for a key that is None, empty, too long or no Unicode
        text, for None as value and for an entry above the cache's limit; EntryTypeError, a TypeError, for other types.
        Nothing has changed then.
        """
        key_size = key_size_of(key)
        check_value(value)
        size = key_size + len(value)
        if size > self._limit:
            raise EntryError(f"entry of {size:,} bytes, key included, exceeds cache limit of {self._limit:,} bytes")
        with self._lock:
            self._settle()
            replaced = self._entries.get(key)
            if replaced is not None:  # it stays readable until the new one takes its place
                self._policy.discard(key)
                self._count_bytes(replaced, -1)
            while self._key_bytes + self._value_bytes + size > self._limit:
                self._count_bytes(self._entries.pop(self._policy.evict()), -1)
                self._evictions += 1
            entry = _Entry(value, key_size, prefix_tokens, self._clock())
            self._entries[key] = entry
            self._count_bytes(entry, +1)
            self._policy.admit(key, Weight(size=size))
            self._policy.release((key,))

    def delete(self, key: str) -> bool:
        """Drop the entry; whether there was one."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return False
            self._policy.discard(key)
            self._count_bytes(entry, -1)
            return True

    def get_metadata(self, key: str) -> EntryMetadata | None:
        """What is known of an entry, as a copy; None where there is none. Not an access."""
        with self._lock:
            self._settle()
            entry = self._entries.get(key)
            if entry is None:
                return None
            return {
                "timestamp": entry.timestamp,
                "size_mb": entry.size / MB,
                "access_count": entry.access_count,
                "prefix_tokens": entry.prefix_tokens,
                "key_size_bytes": entry.key_size,
                "value_size_bytes": len(entry.value),
                "entry_size_bytes": entry.size,
            }

    def get_stats(self) -> CacheStats:
        """What is held now, and what happened since the start or the last `clear`."""
        with self._lock:
            self._settle()
            reads = self._hits + self._misses
            return {
                "total_entries": len(self._entries),
                "memory_used_mb": (self._key_bytes + self._value_bytes) / MB,
                "key_memory_mb": self._key_bytes / MB,
                "value_memory_mb": self._value_bytes / MB,
                "cache_hits": self._hits,
                "cache_misses": self._misses,
                "hit_rate": self._hits / reads if reads else 0.0,
                "evictions": self._evictions,
            }

    def _settle(self) -> None:
        """Count the reads noted so far and tell the policy of the hits. The caller holds the lock."""
        take, entries = self._notes.popleft, self._entries
        hits: list[str] = []
        for _ in range(len(self._notes)):
            key = take()
            if key is None:
                self._misses += 1
                continue
            self._hits += 1
            entry = entries.get(key)
            if entry is not None:  # else it went since it was read
                entry.access_count += 1
                hits.append(key)
        self._policy.access(hits)

    def _count_bytes(self, entry: _Entry, sign: int) -> None:
        self._key_bytes += sign * entry.key_size
        self._value_bytes += sign * len(entry.value)
