"""The RAM tier: encoded blocks in host memory within a limit of bytes, by a mechanism that the byte cache shares."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from emberkv.core.policies.eviction import LRU, EntryCost, EvictionPolicy
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.partial import PartialIndex, PartialPlace
from emberkv.tiers.stats import TierStats


class SizedEntry(Protocol):
    """size: bytes that the entry takes, its key included. owner: whose share of the limit it takes."""

    @property
    def size(self) -> int: ...

    @property
    def owner(self) -> str: ...


K = TypeVar("K", bound=Hashable)
E = TypeVar("E", bound=SizedEntry)


class BoundedStore(Generic[K, E]):
    """A dictionary of entries whose sizes together never exceed ``max_bytes``; a policy decides what is evicted.

    ``entries`` may be read by any thread at any time; the caller holds a lock of its own around the methods.
    """

    def __init__(self, max_bytes: int, make_policy: Callable[[], EvictionPolicy[K]]) -> None:
        self.max_bytes = max_bytes
        self.entries: dict[K, E] = {}
        self.bytes = 0
        self.evictions = 0
        self._make_policy = make_policy
        self._policy = make_policy()

    def put(self, key: K, entry: E) -> list[E]:
        """Store an entry of at most ``max_bytes`` in place of the one under its key, and evict until it fits.

        Returns what was evicted. The former entry is readable until the new one takes its place, and stays where all
        that could be evicted is guaranteed to other owners; ``entries`` says which of the two it is.
        """
        policy, size, owner = self._policy, entry.size, entry.owner
        replaced = self.entries.get(key)
        room = self.max_bytes - size
        if replaced is not None:
            policy.discard(key)
            room += replaced.size
        evicted: list[E] = []
        while self.bytes > room:
            if not policy.available_to(owner):
                if replaced is not None:
                    self._admit(key, replaced.size, replaced.owner)
                return evicted
            evicted.append(self._evict(policy.evict_for(owner)))
        self.entries[key] = entry
        self.bytes += self.max_bytes - room
        self._admit(key, size, owner)
        evicted += [self._evict(surplus) for surplus in policy.evict_surplus()]
        return evicted

    def access(self, keys: Iterable[K]) -> None:
        """The keys, each of which has an entry, were used, the last one most recently."""
        self._policy.access(keys)

    def remove(self, key: K) -> E | None:
        """Drop an entry and return it; None where there is none."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._policy.discard(key)
            self.bytes -= entry.size
        return entry

    def clear(self) -> None:
        """Drop all entries and what the policy remembers; ``evictions`` goes on."""
        self.entries.clear()
        self._policy = self._make_policy()
        self.bytes = 0

    def _admit(self, key: K, size: int, owner: str) -> None:
        self._policy.admit(key, EntryCost(size=size, owner=owner))
        self._policy.release((key,))

    def _evict(self, key: K) -> E:
        entry = self.entries.pop(key)
        self.bytes -= entry.size
        self.evictions += 1
        return entry


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
    keeps_partial = True

    def __init__(self, max_bytes: int, *, policy: PolicyFactory = LRU, name: str = "ram") -> None:
        if max_bytes <= 0:
            raise ConfigError(f"the RAM tier's size is {max_bytes} bytes; it must be above 0")
        self.name = name
        self._lock = threading.Lock()  # for all but look-ups, which read the entries alone
        self._store: BoundedStore[bytes, TierEntry] = BoundedStore(max_bytes, policy)
        self._entries = self._store.entries
        self._partial = PartialIndex()
        self._owners: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        for index, block_hash in enumerate(block_hashes):
            entry = self._entries.get(block_hash)
            if entry is None or (exact and not entry.exact):
                return index
        return len(block_hashes)

    def block_hashes(self) -> list[bytes]:
        return [block_hash for block_hash, entry in list(self._entries.items()) if entry.partial is None]

    def partial_counts(self, parent: bytes) -> list[int]:
        return self._partial.counts(parent)

    def partial_place(self, block_hash: bytes) -> PartialPlace | None:
        return self._partial.place(block_hash)

    def partial_owner(self, block_hash: bytes) -> str | None:
        entry = self._entries.get(block_hash)
        return None if entry is None else entry.owner

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        with self._lock:
            self._use(block_hashes)
            return [self._entries.get(block_hash) for block_hash in block_hashes]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        with self._lock:
            self._use(block_hashes)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        evicted: list[bytes] = []
        with self._lock:
            count = sum(self._store_one(entry, evicted) for entry in reversed(entries))
            return StoreResult(count, [block_hash for block_hash in evicted if block_hash not in self._entries])

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        with self._lock:
            wanted = [*block_hashes, *(self._partial.removed_with(block_hashes) if remember else ())]
            removed = [entry for block_hash in wanted if (entry := self._store.remove(block_hash)) is not None]
            for entry in removed:
                self._owners[entry.owner] -= entry.size
                self._partial.discard(entry.block_hash)
            return RemovalResult(sum(entry.partial is None for entry in removed))

    def clear(self) -> RemovalResult:
        with self._lock:
            count = len(self._entries) - len(self._partial)
            self._store.clear()
            self._owners.clear()
            self._partial.clear()
            return RemovalResult(count)

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
            elif entry.partial is not None:
                self._partial.add(entry.block_hash, entry.partial)
        else:
            self._skipped["no room"] += 1
        for each in gone:
            self._owners[each.owner] -= each.size
            if each.partial is None:
                evicted.append(each.block_hash)
            else:
                self._partial.discard(each.block_hash)
        return kept
