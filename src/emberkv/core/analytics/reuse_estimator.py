"""Estimates what hit rate a cache of other sizes would have on the traffic that is being served.

Spatial sampling (SHARDS; Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015): only blocks whose
block hash falls into a part of all hashes are followed, and their depth in an LRU stack is scaled up by that part's
inverse. Block hashes are SHA-256, so they are their own hash. Memory is bounded: when too many blocks are followed, the
part is halved, until it is so small that what does not fit lies deeper than the largest capacity asked about.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Generic, TypeVar

from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError

K = TypeVar("K", bound=Hashable)

_FEWEST_PLACES = 1024


class LRUStack(Generic[K]):
    """All keys that were used, the most recent on top: a key's depth is the size that an LRU cache needs to have it.

    Mattson et al., "Evaluation techniques for storage hierarchies" (IBM Systems Journal, 1970): an LRU cache of any
    size holds the top of one and the same stack, so one pass over the uses gives the hits of every size.

    Each operation is O(log n) a key, n being the keys in the stack.

    A key's place is the number of uses before its last one; a use leaves a hole in the key's old place. Keys above a
    place are the places above it less their holes, which a Fenwick tree counts. Full places are numbered anew.
    """

    def __init__(self) -> None:
        self._places: OrderedDict[K, int] = OrderedDict()
        self._next = 0
        self._holes = 0
        self._tree = [0] * (_FEWEST_PLACES + 1)

    def __len__(self) -> int:
        return len(self._places)

    def depths(self, keys: Iterable[K]) -> list[int | None]:
        """How many keys an LRU cache must hold to have each; None for one that is not in the stack."""
        return [self._depth(self._places.get(key)) for key in keys]

    def _depth(self, place: int | None) -> int | None:
        if place is None:
            return None
        tree, holes_below, at = self._tree, 0, place
        while at:
            holes_below += tree[at]
            at &= at - 1
        return self._next - place - (self._holes - holes_below)

    def use(self, keys: Sequence[K]) -> None:
        """Put different keys on top, the first one uppermost, as a request's blocks are released tail first."""
        if self._next + len(keys) >= len(self._tree):
            self._renumber(len(keys))
        places, tree, size = self._places, self._tree, len(self._tree)
        for key in reversed(keys):
            place = places.pop(key, None)
            if place is not None:
                self._holes += 1
                at = place + 1
                while at < size:
                    tree[at] += 1
                    at += at & -at
            places[key] = self._next
            self._next += 1

    def drop_oldest(self) -> K:
        """Remove and return the lowest key. Raises KeyError when there is none."""
        return self._places.popitem(last=False)[0]

    def drop_unless(self, kept: Callable[[K], bool]) -> None:
        """Remove every key that is not to be kept. O(n)."""
        self._places = OrderedDict((key, place) for key, place in self._places.items() if kept(key))
        self._renumber(0)

    def _renumber(self, coming: int) -> None:
        for place, key in enumerate(self._places):
            self._places[key] = place
        self._next = len(self._places)
        self._holes = 0
        self._tree = [0] * (2 * (self._next + coming) + _FEWEST_PLACES)


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
