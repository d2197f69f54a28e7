"""The RAM tier: encoded blocks in host memory, below a pool that is on a device or is small."""

import threading
from collections import Counter
from collections.abc import Sequence

from emberkv.core.policies.eviction import LRU
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Removed, Stored, Tier, TierEntry
from emberkv.tiers.bounded_store import BoundedStore
from emberkv.tiers.stats import TierStats


class MemoryTier(Tier):
    """A `Tier` in a dictionary. An entry is one immutable value, so a load sees the whole of the old or of the new one.

    max_bytes: the limit of the entries' `TierEntry.size` together. Raises ConfigError where it is not above 0.

    >>> tier = MemoryTier(2**20)
    >>> tier.store([TierEntry(b"first", "", b"bytes"), TierEntry(b"second", "", b"more bytes")]).count
    2
    >>> tier.lookup([b"first", b"second", b"third"])  # how many are here, from the first on
    2
    >>> tier.load([b"second"])[0].data
    b'more bytes'
    """

    refresh_seconds = None

    def __init__(self, max_bytes: int, *, policy: PolicyFactory = LRU, name: str = "ram") -> None:
        if max_bytes <= 0:
            raise ConfigError(f"the RAM tier's size is {max_bytes} bytes; it must be above 0")
        self.name = name
        self._lock = threading.Lock()  # for all but look-ups, which read the entries alone
        self._store: BoundedStore[bytes, TierEntry] = BoundedStore(max_bytes, policy)
        self._entries = self._store.entries
        self._owners: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        for index, block_hash in enumerate(block_hashes):
            entry = self._entries.get(block_hash)
            if entry is None or (exact and not entry.exact):
                return index
        return len(block_hashes)

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        with self._lock:
            self._use(block_hashes)
            return [self._entries.get(block_hash) for block_hash in block_hashes]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        with self._lock:
            self._use(block_hashes)

    def store(self, entries: Sequence[TierEntry]) -> Stored:
        evicted: list[bytes] = []
        with self._lock:
            count = sum(self._store_one(entry, evicted) for entry in reversed(entries))
            return Stored(count, [block_hash for block_hash in evicted if block_hash not in self._entries])

    def remove(self, block_hashes: Sequence[bytes]) -> Removed:
        with self._lock:
            removed = [entry for block_hash in block_hashes if (entry := self._store.remove(block_hash)) is not None]
            for entry in removed:
                self._owners[entry.owner] -= entry.size
            return Removed(len(removed))

    def clear(self) -> Removed:
        with self._lock:
            count = len(self._entries)
            self._store.clear()
            self._owners.clear()
            return Removed(count)

    def refresh(self) -> None:
        """No other process changes this one's memory."""

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._entries),
                bytes=self._store.bytes,
                max_bytes=self._store.max_bytes,
                bytes_by_owner={owner: size for owner, size in self._owners.items() if size},
                evictions=self._store.evictions,
                skipped=dict(self._skipped),
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _use(self, block_hashes: Sequence[bytes]) -> None:
        self._store.access([block_hash for block_hash in reversed(block_hashes) if block_hash in self._entries])

    def _store_one(self, entry: TierEntry, evicted: list[bytes]) -> bool:
        """Whether the block is here now. Where there is no room for it, the entry that it would replace stays."""
        replaced = self._entries.get(entry.block_hash)
        if replaced is not None and (replaced.exact or not entry.exact):
            return True
        if entry.size > self._store.max_bytes:
            self._skipped["too large"] += 1
            return False
        gone = self._store.put(entry.block_hash, entry)
        kept = self._entries.get(entry.block_hash) is entry
        if kept or any(each is entry for each in gone):
            self._owners[entry.owner] += entry.size
            if replaced is not None:
                self._owners[replaced.owner] -= replaced.size
        else:
            self._skipped["no room"] += 1
        for each in gone:
            self._owners[each.owner] -= each.size
            evicted.append(each.block_hash)
        return kept
