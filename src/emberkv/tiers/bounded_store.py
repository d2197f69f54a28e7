"""Entries within a limit of bytes: the mechanism that the RAM tier and the public byte cache share."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Protocol, TypeVar

from emberkv.core.policies.eviction_policy import EntryCost, EvictionPolicy


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
        for surplus in tuple(policy.surplus()):
            policy.discard(surplus)
            evicted.append(self._evict(surplus))
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
