"""Keys in order of their ranks: a heap whose outdated entries are passed over and, when they are many, swept out."""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound=tuple[Any, ...])

_MOST_OUTDATED = 64
"""Beside as many as there are keys."""


class Ranking(Generic[K, R]):
    """Each operation is O(log n) amortized, looking keys up O(1). Ranks of different keys must differ."""

    def __init__(self) -> None:
        self._ranks: dict[K, R] = {}
        self._heap: list[tuple[R, K]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: K) -> bool:
        return key in self._ranks

    def rank(self, key: K) -> R:
        """Raises KeyError for a key that is not in."""
        return self._ranks[key]

    def place(self, key: K, rank: R) -> None:
        """Put ``key`` in, or move it."""
        self._ranks[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + _MOST_OUTDATED:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def remove(self, key: K) -> None:
        """Raises KeyError for a key that is not in."""
        del self._ranks[key]

    def first(self) -> tuple[K, R]:
        """The key of lowest rank, and the rank. Raises KeyError when there is none."""
        heap = self._heap
        while self._ranks:
            rank, key = heap[0]
            if self._ranks.get(key) == rank:
                return key, rank
            heappop(heap)
        raise KeyError("nothing is ranked")
