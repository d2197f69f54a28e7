"""Prompts on their way: blocks that a replica is about to have, because it computes them for an earlier request.

A replica's events tell of a block when it is computed. Until then, a request with the same beginning would be sent
elsewhere and compute it a second time.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from emberkv.core.hashing import BlockHash


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    slot: int
    block_hashes: Sequence[BlockHash]


class InFlight:
    """Prompts that were sent to replicas, each until its time to live is over.

    A prompt is found by some of its block hashes: those at depths that grow by about a quarter. Two prompts with a
    block hash in common have all blocks before it in common, so the exact depth is found by bisection from there.

    >>> in_flight = InFlight()
    >>> system, one, other = bytes(32), bytes([1] * 32), bytes([2] * 32)
    >>> in_flight.add(3, [system, one], until=10.0)
    >>> in_flight.depths([system, other], now=5.0)
    {3: 1}
    >>> in_flight.depths([system, other], now=11.0)
    {}
    """

    def __init__(self) -> None:
        self._by_hash: dict[BlockHash, dict[int, _Prompt]] = {}  # of each slot, the latest prompt with that block
        self._ends: list[tuple[float, int, _Prompt]] = []
        self._added = count()

    def add(self, slot: int, block_hashes: Sequence[BlockHash], until: float) -> None:
        """A prompt was sent to a replica. until: when it is forgotten."""
        prompt = _Prompt(slot, block_hashes)
        for depth in _depths(len(block_hashes)):
            self._by_hash.setdefault(block_hashes[depth - 1], {})[slot] = prompt
        heappush(self._ends, (until, next(self._added), prompt))

    def depths(self, block_hashes: Sequence[BlockHash], now: float) -> dict[int, int]:
        """By slot, how many leading blocks are being computed there."""
        while self._ends and self._ends[0][0] < now:
            self._remove(heappop(self._ends)[2])
        found: dict[int, int] = {}
        if not self._by_hash:
            return found
        for depth in reversed(list(_depths(len(block_hashes)))):
            for slot, prompt in self._by_hash.get(block_hashes[depth - 1], {}).items():
                if slot not in found:
                    found[slot] = _common(prompt.block_hashes, block_hashes, depth)
        return found

    def forget(self, slot: int) -> None:
        """The replica has lost its requests."""
        gone = [each for each in self._ends if each[2].slot == slot]
        self._ends = sorted(each for each in self._ends if each[2].slot != slot)
        for _, _, prompt in gone:
            self._remove(prompt)

    def _remove(self, prompt: _Prompt) -> None:
        for depth in _depths(len(prompt.block_hashes)):
            block_hash = prompt.block_hashes[depth - 1]
            by_slot = self._by_hash.get(block_hash)
            if by_slot is not None and by_slot.get(prompt.slot) is prompt:
                del by_slot[prompt.slot]
                if not by_slot:
                    del self._by_hash[block_hash]


def _depths(blocks: int) -> Iterator[int]:
    depth = 1
    while depth <= blocks:
        yield depth
        depth += 1 + depth // 4


def _common(one: Sequence[BlockHash], other: Sequence[BlockHash], known: int) -> int:
    """How many leading blocks two chains have in common, of which ``known`` are known to be equal."""
    longest = min(len(one), len(other))
    return known + bisect_left(range(known, longest), True, key=lambda at: one[at] != other[at])
