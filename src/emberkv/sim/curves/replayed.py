"""The hit rate of any policy at one capacity: the trace replayed through the pool that serves, whole or sampled.

Spatial sampling (SHARDS; Waldspurger et al., FAST 2015; for any policy, "Cache modeling and optimization using
miniature simulations", ATC 2017): a block is followed if its block hash falls into a share of all hashes, in a pool of
that share of the capacity. Blocks are sampled one by one, not by whole chains: what is left of a chain is still in
order, so a prefix of it is still a prefix, while chains that begin alike would all be in the sample or all out of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import sqrt

from emberkv.core.block_pool import BlockCost, BlockPool, uniform_cost
from emberkv.core.policies.eviction import make_policy
from emberkv.errors import ConfigError
from emberkv.sim.cache_only import ReferenceChain
from emberkv.sim.curves.accesses import ROOT, Access, Hits
from emberkv.sim.curves.lru import LRUCurve

_HASH_BYTES = 8


def replay(
    accesses: Iterable[Access], capacity: int, policy: str = "lru", *, block_cost: BlockCost = uniform_cost
) -> Hits:
    """Hits of a pool of ``capacity`` blocks under an eviction policy, one request after the other, each whole.

    A request larger than the pool is refused and leaves nothing behind. An answer that is there already is not stored
    a second time. block_cost: what a block is worth, for policies that ask. Raises ConfigError for an unknown policy.
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
    """What is left of each access when only ``share`` of all blocks is followed."""
    threshold = round(share * (1 << 8 * _HASH_BYTES)).to_bytes(_HASH_BYTES)
    for access in accesses:
        asked = [block_hash for block_hash in access.blocks[: access.asked] if block_hash < threshold]
        left = [block_hash for block_hash in access.blocks[access.asked :] if block_hash < threshold]
        yield replace(access, blocks=asked + left, asked=len(asked))


class SampledReplay:
    """`replay` at a share of its effort, set right by what the same sample gets wrong about LRU.

    The blocks that happen to be sampled shift the misses of every policy alike, and LRU's are known exactly from
    `LRUCurve`: a policy's misses are LRU's and, scaled up, the difference between the two in the sample.
    """

    def __init__(self, accesses: Iterable[Access], exact: LRUCurve, share: float) -> None:
        """Raises ConfigError unless the share is above 0 and below 1."""
        if not 0 < share < 1:
            raise ConfigError(f"a share of {share} is no sample; it must be above 0 and below 1")
        self._accesses = list(sample(accesses, share))
        self._asked = sum(access.asked for access in self._accesses)
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
            lru = replay(self._accesses, small)
            other = replay(
                self._accesses, small, policy, block_cost=lambda position: block_cost(round(position / self._share))
            )
            hits = min(unlimited.hits, max(0, exact.hits + round((other.hits - lru.hits) / self._share)))
            tokens = round(unlimited.hit_tokens * hits / unlimited.hits) if unlimited.hits else 0
            points.append(replace(exact, hits=hits, hit_tokens=tokens))
            misses = (self._asked - lru.hits) / self._share
            rate = hits / max(1, exact.references)
            by_chance = 2 * sqrt(rate * (1 - rate) / max(1, self._blocks))
            off = abs(misses - (self._exact.asked - exact.hits)) / max(1, exact.references)
            error = max(error, off, by_chance)
        return points, error
