"""The upper bound: the hit rate that no eviction policy can exceed, whatever it knows of the future.

Belady's MIN ("A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal, 1966) with
bypass: a block is kept only while its next use is sooner than that of whatever it would displace. Blocks are taken one
by one and need not be kept in whole prefixes, so the bound also holds for caches that hit whole prefixes only.
"""

from array import array
from collections.abc import Iterable
from heapq import heappop, heappush

from emberkv.core.hashing import BlockHash
from emberkv.sim.curves.accesses import Access, Hits

_NEVER = 2**62


class Optimal:
    """Made once from the accesses, 16 bytes a use in memory; each capacity is then O(uses * log capacity)."""

    def __init__(self, accesses: Iterable[Access]) -> None:
        self._unlimited = Hits(None)
        self._block_size = 1
        self._blocks = array("q")
        self._next = array("q")
        self._link(accesses)

    def _link(self, accesses: Iterable[Access]) -> None:
        """Number the blocks, and note for each use when its block is next looked up, if that is its next use."""
        numbers: dict[BlockHash, int] = {}
        last: dict[int, int] = {}
        total = self._unlimited
        for access in accesses:
            total.references += access.references
            total.prompt_tokens += access.prompt_tokens
            self._block_size = access.block_size
            hits = 0
            for position, block_hash in enumerate(access.blocks):
                number = numbers.setdefault(block_hash, len(numbers))
                before = last.get(number)
                if before is not None and position < access.asked:
                    self._next[before] = len(self._blocks)
                    hits += 1
                last[number] = len(self._blocks)
                self._blocks.append(number)
                self._next.append(_NEVER)
            total.hits += hits
            total.hit_tokens += access.tokens(hits)

    def at(self, capacity: int) -> Hits:
        """capacity: in blocks, at least 1. Tokens: as many as so many hits can hold."""
        hits = self._hits(capacity)
        tokens = min(hits * self._block_size, self._unlimited.hit_tokens)
        return Hits(capacity, self._unlimited.references, hits, self._unlimited.prompt_tokens, tokens)

    def _hits(self, capacity: int) -> int:
        kept: dict[int, int] = {}
        furthest: list[tuple[int, int]] = []
        hits = 0
        for number, following in zip(self._blocks, self._next, strict=True):
            if kept.pop(number, None) is not None:
                hits += 1
            if following == _NEVER:
                continue
            if len(kept) == capacity:
                while kept.get(furthest[0][1]) != -furthest[0][0]:
                    heappop(furthest)
                if -furthest[0][0] <= following:
                    continue
                del kept[heappop(furthest)[1]]
            kept[number] = following
            heappush(furthest, (-following, number))
        return hits
