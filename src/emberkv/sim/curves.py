"""Hit rate against cache size, without time: exact where one pass over the trace gives it, sampled elsewhere.

Counted as published figures of traces count: every block that a prompt takes is a reference, the partial last one
included. Where the answer is known, its full blocks stay in the cache too, and the prompt's partial block is part of
one of them; it then counts as a reference that cannot be found.
"""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from heapq import heappop, heappush
from itertools import accumulate, islice
from math import sqrt

from emberkv.core.analytics.reuse_estimator import LRUStack
from emberkv.core.block_pool import BlockCost, BlockPool, uniform_cost
from emberkv.core.hashing import BlockHash
from emberkv.core.policies.eviction import make_policy
from emberkv.errors import ConfigError
from emberkv.sim.build import root_of
from emberkv.sim.cache_only import ReferenceChain
from emberkv.sim.run import Results
from emberkv.workload.request import Request, content_hashes
from emberkv.workload.source import ASSUMED, Source, unroll

ROOT = sha256(b"emberkv-curves-1").digest()


@dataclass(frozen=True, slots=True)
class Access:
    """The blocks that a request looks up in a cache, and those that it leaves behind.

    blocks: different ones, in chain order; the first ``asked`` are looked up, and all of them are left behind.

    >>> seen = Access([b"a", b"b", b"c"], asked=2, prompt_tokens=40, block_size=16)
    >>> seen.references, seen.tokens(hits=2)
    (3, 32)
    """

    blocks: list[BlockHash]
    asked: int
    prompt_tokens: int
    block_size: int

    @property
    def references(self) -> int:
        return -(-self.prompt_tokens // self.block_size)

    def tokens(self, hits: int) -> int:
        """Prompt tokens that the first ``hits`` blocks hold."""
        return min(hits * self.block_size, self.prompt_tokens)


def access(request: Request, block_size: int, root: BlockHash = ROOT) -> Access:
    """root: requests of different roots share nothing."""
    prompt = request.prompt_tokens
    full = prompt - prompt % block_size
    known = len(request.content) - len(request.content) % block_size
    if known <= full:
        blocks = request.block_references(root, block_size)
        return Access(blocks, len(blocks), prompt, block_size)
    blocks = content_hashes(root, request.content, 0, known, block_size)
    return Access(blocks, full // block_size, prompt, block_size)


def accesses(
    requests: Iterable[Request], block_size: int, root_of: Callable[[Request], BlockHash] = lambda _: ROOT
) -> Iterator[Access]:
    """One request in memory at a time."""
    return (access(request, block_size, root_of(request)) for request in requests)


@dataclass(slots=True)
class Hits:
    """What a cache of one capacity found. capacity: in blocks; None is unlimited.

    >>> hits = Hits(capacity=100, references=40, hits=10, prompt_tokens=640, hit_tokens=160)
    >>> hits.block_rate, hits.token_rate
    (0.25, 0.25)
    """

    capacity: int | None
    references: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0

    @property
    def block_rate(self) -> float:
        return self.hits / self.references if self.references else 0.0

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class LRUCurve:
    """LRU's hits at every capacity at once, exactly, in one pass over the accesses.

    The pool admits a request whole and releases it tail first. So a block is never more recent than the block before it
    in its chain, an LRU cache loses the end of a chain before its beginning, and what it holds of a prompt is always a
    prefix. Admitting a request keeps its hits and evicts the least recent of the rest: the cache is again the top of
    the same stack that every larger cache is the top of. Hits at a capacity are then the blocks no deeper in the stack
    than it, as long as the capacity takes the largest request; a smaller cache refuses that request, and is another
    cache. It takes O(log n) a block; memory grows with the number of different blocks.

    >>> seen = [Access([name], 1, prompt_tokens=16, block_size=16) for name in (b"a", b"b", b"a", b"c", b"b")]
    >>> curve = LRUCurve(seen)
    >>> [curve.at(capacity).hits for capacity in (1, 2, 3)], curve.enough
    ([0, 1, 2], 3)
    """

    def __init__(self, accesses: Iterable[Access]) -> None:
        self.references = 0
        self.asked = 0
        """References that can be found."""
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
        """A cache that never evicts."""
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


_NEVER = 2**62


class Optimal:
    """The upper bound: the hit rate that no eviction policy can exceed, whatever it knows of the future.

    Belady's MIN ("A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal, 1966) with
    bypass: a block is kept only while its next use is sooner than that of the block it would displace. Blocks are taken
    one by one and need not be kept in whole prefixes, so the bound also holds for caches that hit whole prefixes only.
    It takes 16 bytes a use in memory, and O(uses * log capacity) for each capacity.

    >>> seen = [Access([name], 1, prompt_tokens=16, block_size=16) for name in (b"a", b"b", b"a", b"c", b"b")]
    >>> [Optimal(seen).at(capacity).hits for capacity in (1, 2)]
    [1, 2]
    """

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
        """The bound at ``capacity`` blocks, at least 1. Its tokens are the most that its hits can hold."""
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


_HASH_BYTES = 8


def replay(
    accesses: Iterable[Access], capacity: int, policy: str = "lru", *, block_cost: BlockCost = uniform_cost
) -> Hits:
    """Hits of a pool of ``capacity`` blocks under an eviction policy, one request after the other, each whole.

    It is the pool that serves. A request larger than the pool is refused and leaves nothing behind. An answer that is
    there already is not stored a second time. block_cost: what a block is worth, for policies that ask. Raises
    ConfigError for an unknown policy.
    """
    pool: BlockPool | None = None
    total = Hits(capacity)
    for access in accesses:
        pool = pool or BlockPool(capacity, access.block_size, policy=make_policy(policy), block_cost=block_cost)
        total.references += access.references
        total.prompt_tokens += access.prompt_tokens
        if len(access.blocks) > capacity:
            continue
        chain = ReferenceChain(ROOT, access.blocks, access.block_size)
        found = pool.match(chain, stop=len(access.blocks)).blocks
        hits = min(len(found), access.asked)
        total.hits += hits
        total.hit_tokens += access.tokens(hits)
        pool.pin(found)
        fresh = pool.allocate(len(access.blocks) - len(found))
        computed = [pool.commit(block, chain, position, exact=True) for position, block in enumerate(fresh, len(found))]
        pool.free([*found, *computed])
    return total


def sample(accesses: Iterable[Access], share: float) -> Iterator[Access]:
    """Each access, reduced to the blocks in a sample of ``share`` of all blocks."""
    threshold = round(share * (1 << 8 * _HASH_BYTES)).to_bytes(_HASH_BYTES)
    for access in accesses:
        asked = [block_hash for block_hash in access.blocks[: access.asked] if block_hash < threshold]
        left = [block_hash for block_hash in access.blocks[access.asked :] if block_hash < threshold]
        yield replace(access, blocks=asked + left, asked=len(asked))


class SampledReplay:
    """`replay` at a share of its effort, corrected by what the same sample gets wrong about LRU.

    Spatial sampling (SHARDS; Waldspurger et al., FAST 2015; for any policy, "Cache modeling and optimization using
    miniature simulations", ATC 2017): a block is followed if its block hash falls into a share of all hashes, in a pool
    of that share of the capacity. Blocks are sampled one by one, not by whole chains: what is left of a chain is still
    in order, so a prefix of it is still a prefix, while chains that begin alike would all be in the sample or all out
    of it. The blocks that happen to be sampled shift the misses of every policy alike, and LRU's are known exactly from
    `LRUCurve`: a policy's misses are LRU's and, scaled up, the difference between the two in the sample.

    >>> names = [bytes([number % 40]) * 32 for number in range(200)]
    >>> seen = [Access([name], 1, prompt_tokens=16, block_size=16) for name in names]
    >>> (hits,), error = SampledReplay(seen, LRUCurve(seen), share=0.5).curve([40], "fifo")
    >>> hits.hits
    160
    """

    def __init__(self, accesses: Iterable[Access], exact: LRUCurve, share: float) -> None:
        """Raises ConfigError unless the share is above 0 and below 1."""
        if not 0 < share < 1:
            raise ConfigError(f"a share of {share} is no sample; it must be above 0 and below 1")
        self._accesses = list(sample(accesses, share))
        self._lru = LRUCurve(self._accesses)
        self._blocks = len({block for access in self._accesses for block in access.blocks[: access.asked]})
        self._exact = exact
        self._share = share

    def curve(
        self, capacities: Sequence[int], policy: str, *, block_cost: BlockCost = uniform_cost
    ) -> tuple[list[Hits], float]:
        """The hits at each capacity (in blocks), and the error of the rates, at the capacity where it is worst.

        It is how far the sample alone, not set right, is off from LRU's exact rate, which may be little by luck, and at
        least two standard errors of a share that is estimated from as many blocks as were sampled.
        Raises ConfigError for an unknown policy, or a capacity that the largest request exceeds.
        """
        points, error = [], 0.0
        unlimited = self._exact.unlimited
        for capacity in capacities:
            exact, small = self._exact.at(capacity), max(1, round(capacity * self._share))
            lru = self._lru_hits(small)
            other = replay(
                self._accesses, small, policy, block_cost=lambda position: block_cost(round(position / self._share))
            )
            hits = min(unlimited.hits, max(0, exact.hits + round((other.hits - lru) / self._share)))
            tokens = round(unlimited.hit_tokens * hits / unlimited.hits) if unlimited.hits else 0
            points.append(replace(exact, hits=hits, hit_tokens=tokens))
            misses = (self._lru.asked - lru) / self._share
            rate = hits / max(1, exact.references)
            by_chance = 2 * sqrt(rate * (1 - rate) / max(1, self._blocks))
            off = abs(misses - (self._exact.asked - exact.hits)) / max(1, exact.references)
            error = max(error, off, by_chance)
        return points, error

    def _lru_hits(self, capacity: int) -> int:
        """LRU's hits in the sample. The curve holds where no request of the sample is refused."""
        found = self._lru.at(capacity) if capacity >= self._lru.smallest else replay(self._accesses, capacity)
        return found.hits


MOST_REQUESTS = 100_000
"""Requests from the start of a workload that a curve is made from; their blocks are kept in memory."""

POINTS = 24


@dataclass(frozen=True)
class CapacityCurve:
    """Hit rate against capacity. lru: exact at every capacity. best: the bound at `capacities`.

    requests: how many it was made from.

    >>> seen = [Access([name], 1, prompt_tokens=16, block_size=16) for name in (b"a", b"b", b"a")]
    >>> curve = CapacityCurve(LRUCurve(seen), [Optimal(seen).at(2)], [2], requests=3)
    >>> curve.best[0].hits == curve.lru.at(2).hits
    True
    """

    lru: LRUCurve
    best: list[Hits]
    capacities: list[int]
    requests: int


def first_requests(source: Source) -> Iterable[Request]:
    """The first `MOST_REQUESTS` requests, by arrival. Answers that generated follow-ups wait for take an assumed
    time."""
    requests = unroll(source, first_token=ASSUMED.first_token, per_token=ASSUMED.per_token)
    return islice(requests, MOST_REQUESTS)


def spaced(smallest: int, largest: int, count: int = POINTS) -> list[int]:
    """At most ``count`` whole numbers from ``smallest`` to ``largest``, evenly on a logarithmic axis."""
    ratio = (largest / smallest) ** (1 / max(1, count - 1))
    return sorted({min(largest, round(smallest * ratio**step)) for step in range(count)} | {largest})


def capacity_curve(run: Results) -> CapacityCurve | None:
    """The curve of a run's workload, from the smallest capacity that takes every request to one as good as unlimited.

    None without requests. Raises WorkloadError while the workload is read.
    """
    size = run.machine.block_size
    seen = list(accesses(first_requests(run.workload.source()), size, root_of(run.config, size)))
    if not seen:
        return None
    lru, best = LRUCurve(seen), Optimal(seen)
    capacities = spaced(lru.smallest, lru.enough)
    return CapacityCurve(lru, [best.at(capacity) for capacity in capacities], capacities, len(seen))
