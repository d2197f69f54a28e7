"""The RAM tier: encoded blocks in host memory, below a pool that lives elsewhere or is small."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.eviction_policy import Weight
from emberkv.errors import EntryError
from emberkv.tiers.base import PolicyFactory, Stored, TierEntry
from emberkv.tiers.byte_cache import MB, InMemoryKVCacheManager
from emberkv.tiers.stats import TierStats


@dataclass(frozen=True, slots=True)
class _Held:
    owner: str
    exact: bool
    size: int


class MemoryTier:
    """A `Tier` on `InMemoryKVCacheManager`, which counts the bytes: a block's own and 64 for its key.

    max_bytes: its limit. Raises ConfigError, a ValueError, where it is not above 0.
    """

    def __init__(self, max_bytes: int, *, policy: PolicyFactory = LRU, name: str = "ram") -> None:
        self.name = name
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # orders stores and removals; loads and look-ups do not wait for it
        self._held: dict[str, _Held] = {}
        self._owners: Counter[str] = Counter()
        self._evicted: list[bytes] = []
        self._skipped: Counter[str] = Counter()
        self._evictions = 0
        self._cache = InMemoryKVCacheManager(
            max_bytes / MB, make=policy, weigh=self._weigh, on_evict=self._forget_evicted
        )

    def lookup(self, identities: Sequence[bytes], *, exact: bool = False) -> int:
        for index, identity in enumerate(identities):
            held = self._held.get(identity.hex())
            if held is None or (exact and not held.exact):
                return index
        return len(identities)

    def load(self, identities: Sequence[bytes]) -> list[TierEntry | None]:
        found = [self._load_one(identity) for identity in reversed(identities)]
        return found[::-1]

    def _load_one(self, identity: bytes) -> TierEntry | None:
        key = identity.hex()
        held, data = self._held.get(key), self._cache.get(key)
        return TierEntry(identity, held.owner, data, held.exact) if held and data is not None else None

    def touch(self, identities: Sequence[bytes]) -> None:
        for identity in reversed(identities):
            self._cache.get(identity.hex())

    def store(self, entries: Sequence[TierEntry]) -> Stored:
        with self._lock:
            self._evicted = []
            count = sum(self._store_one(entry) for entry in reversed(entries))
            return Stored(count, self._evicted)

    def _store_one(self, entry: TierEntry) -> bool:
        key = entry.identity.hex()
        held = self._held.get(key)
        if held and (held.exact or not entry.exact):
            return True
        size = len(key) + len(entry.data)
        if size > self._max_bytes:
            self._skipped["too large"] += 1
            return False
        self._forget(key)
        self._held[key] = _Held(entry.owner, entry.exact, size)
        self._owners[entry.owner] += size
        try:
            self._cache.set(key, entry.data)
        except EntryError:  # all that could go is guaranteed to others
            self._skipped["no room"] += 1
            self._forget(key)
        return key in self._held

    def remove(self, identities: Sequence[bytes]) -> int:
        with self._lock:
            keys = [identity.hex() for identity in identities]
            for key in keys:
                self._forget(key)
            return sum(self._cache.delete(key) for key in keys)

    def clear(self) -> int:
        with self._lock:
            count = len(self._held)
            self._cache.clear()
            self._held.clear()
            self._owners.clear()
            return count

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._held),
                bytes=sum(self._owners.values()),
                max_bytes=self._max_bytes,
                bytes_by_owner={owner: size for owner, size in self._owners.items() if size},
                evictions=self._evictions,
                skipped=dict(self._skipped),
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _weigh(self, key: str, size: int) -> Weight:
        return Weight(size=size, owner=self._held[key].owner)

    def _forget(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held:
            self._owners[held.owner] -= held.size

    def _forget_evicted(self, key: str) -> None:
        self._forget(key)
        self._evictions += 1
        self._evicted.append(bytes.fromhex(key))
