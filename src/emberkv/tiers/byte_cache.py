"""The public byte cache in host memory, which holds its entries to a limit of bytes.

A read does not wait for the lock: it appends a note of its key to a queue. The next thread to hold the lock applies the
notes in their order before its own work, which is a set, a question about statistics, or now and then a read that finds
the lock free. So reads of many threads do not wait for each other, no read is ever left uncounted, and a set sees the
recency of every read before it. This needs no more than that a dict's look-up and a deque's append are atomic, which
CPython promises with and without its global lock.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypedDict

from emberkv.core.policies.eviction import make_policy
from emberkv.errors import ConfigError, EntryError, EntryTypeError
from emberkv.tiers.memory import BoundedStore

MB = 2**20
"""Bytes."""

MAX_KEY_BYTES = 10 * 1024
"""In UTF-8."""

_MANY_NOTES = 32
"""Each so many-th read applies the notes: many enough for the lock to cost next to nothing, few enough to be quick."""

_MAX_NOTES = 4096
"""Reads noted before one of them waits for the lock, which lets a thread go on that holds it and was interrupted."""


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
    owner: ClassVar[str] = ""  # all entries share one limit
    value: bytes
    key_size: int
    size: int
    prefix_tokens: int | None
    timestamp: float
    access_count: int = 0


class InMemoryKVCacheManager:
    """Bytes by key, within a limit of memory, for any number of threads.

    max_memory_mb: the limit in units of 1,048,576 bytes; fractions are fine. An entry takes its value's bytes and its
    key's in UTF-8. eviction_policy: one of `emberkv.core.policies.eviction.POLICY_NAMES`; all cost O(1) an operation,
    save those that rank entries, which cost O(log n). clock: wall clock in seconds.

    ``cache[key]``, ``cache[key] = value``, ``del cache[key]``, ``in``, ``len`` and iteration do what they do for a
    dictionary; ``cache[key]`` is an access as `get` is, and ``in`` is none. Iteration is over the keys that are there
    when it begins, so that the cache may change meanwhile. An empty cache is false, as an empty dictionary is.

    Raises ConfigError, a ValueError, for an unknown policy or a size that is not a finite number above 0.

    >>> cache = InMemoryKVCacheManager(max_memory_mb=512, eviction_policy="lru")
    >>> cache.set("prefix:0", b"keys and values", prefix_tokens=16)
    >>> cache.get("prefix:0"), cache.get("prefix:1")
    (b'keys and values', None)
    >>> "prefix:0" in cache, len(cache), list(cache)
    (True, 1, ['prefix:0'])
    >>> cache.get_stats()["hit_rate"]
    0.5
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
        self._clock = clock
        self._lock = threading.Lock()
        self._store: BoundedStore[str, _Entry] = BoundedStore(int(limit), partial(make_policy, eviction_policy))
        self._entries = self._store.entries
        self._notes: deque[str | None] = deque()  # of each read in turn: the key found, or None for a miss
        self._key_bytes = 0
        self._hits = self._misses = 0
        self._earlier_evictions = 0  # before the last `clear`

    def clear(self) -> None:
        """Drop all entries, and start the statistics and what the policy remembers anew."""
        with self._lock:
            self._store.clear()
            self._notes = deque()
            self._key_bytes = 0
            self._hits = self._misses = 0
            self._earlier_evictions = self._store.evictions

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
                self._apply_notes()
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
        key_size = _key_size_of(key)
        _check_value(value)
        size, limit = key_size + len(value), self._store.max_bytes
        if size > limit:
            raise EntryError(f"entry of {size:,} bytes, key included, exceeds cache limit of {limit:,} bytes")
        with self._lock:
            self._apply_notes()
            if key not in self._entries:
                self._key_bytes += key_size
            for evicted in self._store.put(key, _Entry(value, key_size, size, prefix_tokens, self._clock())):
                self._key_bytes -= evicted.key_size

    def delete(self, key: str) -> bool:
        """Drop the entry; whether there was one."""
        with self._lock:
            entry = self._store.remove(key)
            if entry is None:
                return False
            self._key_bytes -= entry.key_size
            return True

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __getitem__(self, key: str) -> bytes:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: bytes) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def get_metadata(self, key: str) -> EntryMetadata | None:
        """An entry's metadata, as a copy; None where there is no entry. This is not an access."""
        with self._lock:
            self._apply_notes()
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
        """What the cache holds now, and what it has counted since the start or the last `clear`."""
        with self._lock:
            self._apply_notes()
            reads = self._hits + self._misses
            return {
                "total_entries": len(self._entries),
                "memory_used_mb": self._store.bytes / MB,
                "key_memory_mb": self._key_bytes / MB,
                "value_memory_mb": (self._store.bytes - self._key_bytes) / MB,
                "cache_hits": self._hits,
                "cache_misses": self._misses,
                "hit_rate": self._hits / reads if reads else 0.0,
                "evictions": self._store.evictions - self._earlier_evictions,
            }

    def _apply_notes(self) -> None:
        """Count the reads noted so far, and report the hits to the policy. The caller holds the lock."""
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
        self._store.access(hits)


def _key_size_of(key: str) -> int:
    """Bytes of ``key`` in UTF-8. Raises EntryError and EntryTypeError as `InMemoryKVCacheManager.set` says."""
    if not key:
        raise EntryError(f"key is {key!r}; it cannot be None or empty")
    if not isinstance(key, str):
        raise EntryTypeError(f"key is of type {type(key).__name__}; it must be str")
    try:
        size = len(key) if key.isascii() else len(key.encode())
    except UnicodeEncodeError as error:
        raise EntryError(f"key has a lone surrogate at {error.start}; it must be Unicode text") from error
    if size > MAX_KEY_BYTES:
        raise EntryError(f"key of {size:,} UTF-8 bytes exceeds maximum of {MAX_KEY_BYTES:,} (10KB)")
    return size


def _check_value(value: bytes) -> None:
    """Raises EntryError and EntryTypeError as `InMemoryKVCacheManager.set` says."""
    if value is None:
        raise EntryError("value is None; it must be bytes, of which none are fine")
    if not isinstance(value, bytes):
        raise EntryTypeError(f"value is of type {type(value).__name__}; it must be bytes")
