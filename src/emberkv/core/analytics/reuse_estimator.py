"""The estimator: what hit rate a cache of other sizes would have on the traffic that is being served.

Spatial sampling (SHARDS; Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015): only blocks whose
block hash falls into a part of all hashes are followed, and their depth in an LRU stack is scaled up by that part's
inverse. Block hashes are SHA-256, so they are their own hash. Memory is bounded: when too many blocks are followed, the
part is halved, until it is so small that what does not fit lies deeper than the largest capacity asked about.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from emberkv.core.analytics.lru_stack import LRUStack
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError

GROUPS = 16
"""Groups of sampled blocks whose disagreement gives the error."""

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """hit_rate: share of the blocks looked up that an LRU cache of ``capacity_blocks`` would have had.
    error: one standard error of it, from the spread between groups of sampled blocks; 0 where all are followed.
    """

    capacity_blocks: int
    hit_rate: float
    error: float


class ReuseEstimator:
    """Estimates the hit rate at several capacities at once. Not thread-safe.

    capacities: in blocks. max_followed: most blocks remembered; while there are no more, every block is followed and
    the curve is exact. half_life: after so many blocks looked up, what was counted before weighs half, so
    that the curve follows the traffic.
    """

    def __init__(self, capacities: Sequence[int], *, max_followed: int = 8192, half_life: int = 1_000_000) -> None:
        if not capacities or min(capacities) < 1 or max_followed < 1 or half_life < 1:
            raise ConfigError(
                f"capacities {list(capacities)}, max_followed {max_followed}, half_life {half_life}: "
                "at least one capacity is needed, and each number must be at least 1"
            )
        self.capacities = sorted(set(capacities))
        self.share = 1.0
        self._least_share = min(1.0, max_followed / self.capacities[-1])
        self._max_followed = min(max_followed, self.capacities[-1])
        self._half_life = half_life
        self._since_halved = 0
        self._looked_up = 0.0
        self._stack: LRUStack[BlockHash] = LRUStack()
        self._misses = [[0.0] * len(self.capacities) for _ in range(GROUPS)]

    @property
    def followed(self) -> int:
        """Sampled blocks remembered now."""
        return len(self._stack)

    def access(self, block_hashes: Sequence[BlockHash]) -> None:
        """A request looks up its prompt's blocks, in chain order."""
        sampled = self._sampled(block_hashes)
        deepest, weight = len(self.capacities), 1 / self.share
        for block_hash, depth in zip(sampled, self._stack.depths(sampled), strict=True):
            missed = deepest if depth is None else bisect_left(self.capacities, self._scaled(depth))
            group = self._misses[block_hash[-1] % GROUPS]
            for at in range(missed):
                group[at] += weight
        self._use(sampled)
        self._looked_up += len(block_hashes)
        self._since_halved += len(block_hashes)
        if self._since_halved >= self._half_life:
            self._halve()

    def keep(self, block_hashes: Sequence[BlockHash]) -> None:
        """A request ends and leaves these blocks behind, its answer's included: used now, not looked up."""
        self._use(self._sampled(block_hashes))

    def curve(self) -> list[CurvePoint]:
        """A point for each capacity, smallest first; empty while nothing has been looked up."""
        if not self._looked_up:
            return []
        points = []
        for at, capacity in enumerate(self.capacities):
            counts = [group[at] for group in self._misses]
            mean = sum(counts) / GROUPS
            spread = GROUPS / (GROUPS - 1) * sum((count - mean) ** 2 for count in counts)
            error = sqrt((1 - self.share) * spread) / self._looked_up
            rate = 1 - sum(counts) / self._looked_up
            points.append(CurvePoint(capacity, min(1.0, max(0.0, rate)), error))
        return points

    def _sampled(self, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        if self.share == 1:
            return list(block_hashes)
        threshold = self._threshold
        return [block_hash for block_hash in block_hashes if block_hash < threshold]

    @property
    def _threshold(self) -> bytes:
        """Block hashes below it are in the sample, where that is not all."""
        return round(self.share * (1 << 8 * _HASH_BYTES)).to_bytes(_HASH_BYTES)

    def _scaled(self, depth: int) -> float:
        """The depth among all blocks at which one lies that is ``depth`` among the sampled: itself, and between its
        neighbours above as many others as the sample leaves out."""
        return 1 + (depth - 1) / self.share

    def _use(self, sampled: Sequence[BlockHash]) -> None:
        self._stack.use(sampled)
        while len(self._stack) > self._max_followed:
            if self.share > self._least_share:
                self.share = max(self._least_share, self.share / 2)
                self._stack.drop_unless(self._threshold.__gt__)
            else:
                self._stack.drop_oldest()

    def _halve(self) -> None:
        self._since_halved = 0
        self._looked_up /= 2
        for group in self._misses:
            group[:] = [count / 2 for count in group]
