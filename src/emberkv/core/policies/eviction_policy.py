"""Eviction policies: the order in which entries without a holder are evicted.

A policy knows keys and how they were used, never what they hold, so the same ones order a pool's blocks and a tier's
entries. Keys are block hashes, not block ids: what is remembered of a key must not pass to the next one in the same
block. An entry is admitted once, then held and released any number of times, and leaves by `evict` or `discard`.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class EntryCost:
    """What an entry takes and what it is worth.

    size: bytes, or any unit shared by all entries. cost: the effort to make the entry again, in any shared unit.
    owner: the tenant whose share of the space it takes; "" where there is only one.
    """

    size: float = 1.0
    cost: float = 1.0
    owner: str = ""


class EvictionPolicy(ABC, Generic[K]):
    """Orders keys for eviction. Every operation is O(1), or O(log n) where a heap orders them."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys could be evicted now."""

    def admit(self, key: K, cost: EntryCost) -> None:
        """``key`` is new and held."""

    def access(self, keys: Iterable[K]) -> None:
        """A hit on each key, held or not."""

    @abstractmethod
    def hold(self, keys: Iterable[K]) -> None:
        """Released keys that may not be evicted until released again."""

    @abstractmethod
    def release(self, keys: Iterable[K]) -> None:
        """Held keys that may be evicted from now on, the first listed before the others where all else is equal."""

    @abstractmethod
    def evict(self) -> K:
        """Remove and return the key to go. Raises KeyError when none is released."""

    def evict_for(self, owner: str) -> K:
        """As `evict`, to make room for an entry of ``owner``."""
        return self.evict()

    def available_to(self, owner: str) -> int:
        """How many keys may be evicted to make room for entries of ``owner``."""
        return len(self)

    def bytes_by_owner(self) -> Mapping[str, float]:
        """What each owner has, held or not; empty where owners make no difference."""
        return {}

    def reserved(self, size: float) -> int:
        """How many entries of ``size`` may at worst be kept from an owner for the sake of others."""
        return 0

    def guaranteed(self, owner: str, size: float) -> int:
        """How many entries of ``size`` ``owner`` may have that are never evicted for the sake of others."""
        return 0

    @abstractmethod
    def discard(self, key: K) -> None:
        """A released key whose entry went for another reason."""

    def surplus(self) -> Sequence[K]:
        """Released keys that a quota forbids to keep, to be discarded by the caller after each admit and release."""
        return ()

    def forget(self, key: K) -> None:
        """A held key whose entry is no longer one: drop its history."""

    def retain(self, keys: Iterable[K], until: float) -> int:
        """Evict the keys after all others until then, as far as there is room; returns how many are retained.

        until: on the caller's clock; infinity for good. The keys in chain order; those that are no entries are
        passed over.
        """
        return 0

    def unretain(self, keys: Iterable[K]) -> None:
        """The keys are retained no longer."""

    def expire(self, now: float) -> None:
        """End the retention of what was retained until ``now`` or before."""
