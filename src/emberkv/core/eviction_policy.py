"""Eviction policies: the order in which entries that nobody holds give up their place.

A policy knows keys and how they were used, never what they hold, so the same ones order a pool's blocks and a tier's
entries. Keys are identities, not places: what is remembered of a key must not pass to the next one in its slot.
An entry is admitted once, then held and released any number of times, and leaves by `evict` or `discard`.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Weight:
    """What an entry takes and what it is worth.

    size: bytes, or any unit shared by all entries. cost: the effort to make the entry again, in any shared unit.
    """

    size: float = 1.0
    cost: float = 1.0


class EvictionPolicy(ABC, Generic[K]):
    """Orders keys for eviction. Every operation is O(1), or O(log n) where a heap orders them."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys could be evicted now."""

    def admit(self, key: K, weight: Weight) -> None:
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

    @abstractmethod
    def discard(self, key: K) -> None:
        """A released key whose entry went for another reason."""

    def forget(self, key: K) -> None:
        """A held key whose entry is no longer one: drop its history."""
