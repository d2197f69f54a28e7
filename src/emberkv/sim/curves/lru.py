"""LRU at every capacity at once, exactly, in one pass over the trace.

The pool admits a request whole and releases it tail first. So a block is never more recent than the block before it in
its chain, an LRU cache loses the end of a chain before its beginning, and what it holds of a prompt is always a prefix.
Admitting a request keeps its hits and evicts the least recent of the rest: the cache is again the top of the same stack
that every larger cache is the top of. Hits at a capacity are then the blocks no deeper in the stack than it, as long as
the capacity takes the largest request; a smaller cache refuses that request, and is another cache.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from emberkv.core.analytics.reuse_estimator import LRUStack
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError
from emberkv.sim.curves.accesses import Access, Hits


class LRUCurve:
    """Built from the accesses in order, O(log n) a block; memory grows with the number of different blocks."""

    def __init__(self, accesses: Iterable[Access]) -> None:
        self.references = 0
        self.asked = 0
        """Of the references, those that can be found."""
        self.prompt_tokens = 0
        self.smallest = 1
        """Blocks of the largest request: the least capacity for which the curve holds."""
        hits: Counter[int] = Counter()
        tokens: Counter[int] = Counter()
        stack: LRUStack[BlockHash] = LRUStack()
        for access in accesses:
            self.references += access.references
            self.asked += access.asked
            self.prompt_tokens += access.prompt_tokens
            self.smallest = max(self.smallest, len(access.blocks))
            for position, depth in enumerate(stack.depths(access.blocks[: access.asked])):
                if depth is None:
                    break
                hits[depth] += 1
                tokens[depth] += access.tokens(position + 1) - access.tokens(position)
            stack.use(access.blocks)
        self.unique = len(stack)
        self._depths = sorted(hits)
        self._hits = [0, *accumulate(hits[depth] for depth in self._depths)]
        self._tokens = [0, *accumulate(tokens[depth] for depth in self._depths)]

    @property
    def unlimited(self) -> Hits:
        """A cache that never forgets."""
        return self._point(None, len(self._depths))

    @property
    def enough(self) -> int:
        """The smallest capacity that finds all that an unlimited cache does, in blocks."""
        return max(self._depths[-1], self.smallest) if self._depths else self.smallest

    def at(self, capacity: int) -> Hits:
        """Raises ConfigError for a capacity (in blocks) that the largest request exceeds."""
        if capacity < self.smallest:
            raise ConfigError(
                f"a cache of {capacity} blocks cannot hold the largest request; ask for {self.smallest} or more"
            )
        return self._point(capacity, bisect_right(self._depths, capacity))

    def capacity_for(self, share: float) -> int:
        """The smallest capacity that finds ``share`` (0 to 1) of the tokens that an unlimited cache does, in blocks."""
        wanted = share * self._tokens[-1]
        at = next(at for at, tokens in enumerate(self._tokens) if tokens >= wanted)
        return max(self.smallest, self._depths[at - 1]) if at else self.smallest

    def _point(self, capacity: int | None, at: int) -> Hits:
        return Hits(capacity, self.references, self._hits[at], self.prompt_tokens, self._tokens[at])
