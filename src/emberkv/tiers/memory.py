"""The RAM tier: encoded blocks in host memory, below a pool that is on a device or is small."""

import threading
from collections import Counter
from collections.abc import Sequence

from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.eviction_policy import EvictionPolicy, Weight
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Removed, Stored, Tier, TierEntry
from emberkv.tiers.stats import TierStats

KEY_BYTES = 64
"""Counted for each entry beside its own bytes."""


class MemoryTier(Tier):
    """A `Tier` in a dictionary. An entry is one immutable value, so a load sees the whole of the old or of the new one.

    max_bytes: its limit, for entries and `KEY_BYTES` for each. Raises ConfigError where it is not above 0.
    """

    refresh_seconds = None

    def __init__(self, max_bytes: int, *, policy: PolicyFactory = LRU, name: str = "ram") -> None:
        if max_bytes <= 0:
            raise ConfigError(f"the RAM tier's size is {max_bytes} bytes; it must be above 0")
        self.name = name
        self._max_bytes = max_bytes
        self._make_policy = policy
        self._lock = threading.Lock()  # for all but look-ups, which read the dictionary alone
        self._entries: dict[bytes, TierEntry] = {}
        self._policy: EvictionPolicy[bytes] = policy()
        self._bytes = 0
        self._owners: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._evictions = 0

    def lookup(self, identities: Sequence[bytes], *, exact: bool = False) -> int:
        for index, identity in enumerate(identities):
            entry = self._entries.get(identity)
            if entry is None or (exact and not entry.exact):
                return index
        return len(identities)

    def load(self, identities: Sequence[bytes]) -> list[TierEntry | None]:
        with self._lock:
            self._use(identities)
            return [self._entries.get(identity) for identity in identities]

    def touch(self, identities: Sequence[bytes]) -> None:
        with self._lock:
            self._use(identities)

    def store(self, entries: Sequence[TierEntry]) -> Stored:
        evicted: list[bytes] = []
        with self._lock:
            count = sum(self._store_one(entry, evicted) for entry in reversed(entries))
            return Stored(count, [identity for identity in evicted if identity not in self._entries])

    def remove(self, identities: Sequence[bytes]) -> Removed:
        with self._lock:
            found = [identity for identity in dict.fromkeys(identities) if identity in self._entries]
            for identity in found:
                self._policy.discard(identity)
                self._drop(identity)
            return Removed(len(found))

    def clear(self) -> Removed:
        with self._lock:
            count = len(self._entries)
            self._entries = {}
            self._policy = self._make_policy()
            self._bytes = 0
            self._owners.clear()
            return Removed(count)

    def refresh(self) -> None:
        """Nobody else changes this process's memory."""

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._entries),
                bytes=self._bytes,
                max_bytes=self._max_bytes,
                bytes_by_owner={owner: size for owner, size in self._owners.items() if size},
                evictions=self._evictions,
                skipped=dict(self._skipped),
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _use(self, identities: Sequence[bytes]) -> None:
        self._policy.access([identity for identity in reversed(identities) if identity in self._entries])

    def _store_one(self, entry: TierEntry, evicted: list[bytes]) -> bool:
        """Whether the block is here now. Where there is no room for it, the entry that it would replace stays."""
        replaced = self._entries.get(entry.identity)
        if replaced and (replaced.exact or not entry.exact):
            return True
        size = _size(entry)
        if size > self._max_bytes:
            self._skipped["too large"] += 1
            return False
        if replaced:
            self._policy.discard(entry.identity)
        freed = _size(replaced) if replaced else 0
        while self._bytes - freed + size > self._max_bytes:
            if not self._policy.available_to(entry.owner):  # all that could go is guaranteed to others
                self._skipped["no room"] += 1
                if replaced:
                    self._admit(replaced)
                return False
            self._evict(self._policy.evict_for(entry.owner), evicted)
        if replaced:
            self._drop(entry.identity)
        self._entries[entry.identity] = entry
        self._count(entry, +1)
        self._admit(entry)
        for surplus in list(self._policy.surplus()):
            self._policy.discard(surplus)
            self._evict(surplus, evicted)
        return entry.identity in self._entries

    def _admit(self, entry: TierEntry) -> None:
        self._policy.admit(entry.identity, Weight(size=_size(entry), owner=entry.owner))
        self._policy.release((entry.identity,))

    def _evict(self, identity: bytes, evicted: list[bytes]) -> None:
        self._drop(identity)
        self._evictions += 1
        evicted.append(identity)

    def _drop(self, identity: bytes) -> None:
        self._count(self._entries.pop(identity), -1)

    def _count(self, entry: TierEntry, sign: int) -> None:
        self._bytes += sign * _size(entry)
        self._owners[entry.owner] += sign * _size(entry)


def _size(entry: TierEntry) -> int:
    return KEY_BYTES + len(entry.data)
