"""The sequences that wait for admission, and whether the first of them is known not to fit."""

from collections.abc import Callable
from heapq import heappop, heappush

from emberkv.core.sequence import Sequence, SequenceStatus


class WaitingQueue:
    """A priority queue by `Sequence.rank`. One that ends while it waits is passed over when its turn comes.

    A refusal is remembered, so that the first in line is not matched against the cache at every step: it is asked
    about again when more blocks are free for it than then, or after `forget_refusal`. free_for: the blocks that a
    sequence may have.
    """

    def __init__(self, free_for: Callable[[Sequence], int]) -> None:
        self._free_for = free_for
        self._heap: list[tuple[int, int, Sequence]] = []
        self._free_when_refused: int | None = None

    def push(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        heappush(self._heap, (*sequence.rank, sequence))
        self._free_when_refused = None

    def first(self) -> Sequence | None:
        """Who is next in line, unless it is known not to fit."""
        while self._heap and self._heap[0][2].status is not SequenceStatus.WAITING:
            heappop(self._heap)
        if not self._heap:
            return None
        sequence = self._heap[0][2]
        if self._free_when_refused is not None and self._free_for(sequence) <= self._free_when_refused:
            return None
        return sequence

    def pop(self) -> None:
        """Take out the one that `first` returned."""
        heappop(self._heap)
        self._free_when_refused = None

    def refuse(self, sequence: Sequence) -> None:
        """The one that `first` returned does not fit."""
        self._free_when_refused = self._free_for(sequence)

    def forget_refusal(self) -> None:
        """What is cached or held has changed: the first in line may fit now, even into as few blocks."""
        self._free_when_refused = None
