"""The prefix cache: match, pin, and hand out a lease; everything a sequence does to blocks goes through its lease.

tokens   0 ............... hit ................ full ........ len
         |  shared: found  |  ours: computed,   |  tail: the  |
         |  and pinned     |  then committed    |  last block |
         |                 |  as they fill      |  fills      |
"""

from collections.abc import Sequence

from emberkv.core.block import Block, BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import Chain
from emberkv.core.matching import Match, MatchEnd
from emberkv.errors import ConfigError


class Lease:
    """One sequence's hold on blocks: the block table, in chain order. Release it exactly once, on any way out."""

    __slots__ = (
        "_cache",
        "_chain",
        "_collided",
        "_num_computed",
        "blocks",
        "context_exact",
        "hit_tokens",
        "num_committed",
    )

    def __init__(self, cache: "PrefixCache", chain: Chain, hit: list[Block]) -> None:
        self._cache = cache
        self._chain = chain
        self._collided = False
        self.blocks = hit
        self.num_committed = len(hit)
        self.hit_tokens = len(hit) * cache.pool.block_size
        self.context_exact = all(block.exact for block in hit)
        self._take_tail()
        self._num_computed = self.hit_tokens

    def _take_tail(self) -> None:
        found = self._cache.tail(self._chain, len(self.blocks))
        if found is not None:
            block, tokens = found
            self._cache.pool.take_tail(block)
            self.blocks.append(block)
            self.hit_tokens += tokens

    def missing_blocks(self, num_tokens: int) -> int:
        """How many blocks more the table needs to cover ``num_tokens``."""
        return max(0, self._cache.pool.blocks_for(num_tokens) - len(self.blocks))

    def extend(self, num_tokens: int) -> None:
        """Allocate until the table covers ``num_tokens``. Raises NoFreeBlocksError, with nothing changed."""
        missing = self.missing_blocks(num_tokens)
        if missing:
            owner = self._chain.owner(len(self.blocks) + missing - 1)
            self.blocks += self._cache.pool.allocate(missing, owner)

    def adopt(self, start: int) -> int:
        """Take over blocks that others committed since, from the one with token ``start`` on, the next to compute.

        Only whole alignment units count, as in `acquire`, and only once all before them is committed. Our own blocks
        for that stretch are freed. Returns the number of tokens adopted.
        """
        pool = self._cache.pool
        first = start // pool.block_size
        if self.num_committed < first:
            return 0
        found = self._cache.find(self._chain, start)
        if not found:
            return 0
        pool.pin(found)
        pool.free(self.blocks[first : first + len(found)])
        self.blocks[first : first + len(found)] = found
        self.num_committed = first + len(found)
        self.context_exact = self.context_exact and all(block.exact for block in found)
        self._num_computed = self.num_committed * pool.block_size
        adopted = self._num_computed - start
        self.hit_tokens += adopted
        return adopted

    def commit_prefilled(self, stop: int) -> None:
        """Commit the blocks that are complete now that prefill has computed all tokens up to ``stop``.

        What a whole alignment unit holds is what a cold run computes, if all before it is; the rest may not be, unless
        the engine is uniform.
        """
        whole = stop if self._cache.uniform else stop - stop % self._cache.alignment
        self._commit(whole, exact=True)
        if stop > whole:
            self._commit(stop, exact=False)

    def commit_decoded(self, stop: int) -> None:
        """Commit the blocks that are complete now that a decode step has computed the last token before ``stop``."""
        self._commit(stop, exact=self._cache.uniform)

    def _commit(self, num_computed: int, *, exact: bool) -> None:
        """A collision ends it for good: the identities of all that follows name the other chain as well."""
        self._num_computed = num_computed
        self.context_exact = self.context_exact and exact
        if self._collided or not self._cache.enabled:
            return
        pool = self._cache.pool
        for position in range(self.num_committed, num_computed // pool.block_size):
            block = pool.commit(self.blocks[position], self._chain, position, exact=self.context_exact)
            if block.state is not BlockState.COMMITTED:
                self._collided = True
                return
            self.blocks[position] = block
            self.num_committed = position + 1

    def release(self) -> None:
        """Let go of every block, tail first. What is computed of one that is not full stays for who goes on there."""
        pool = self._cache.pool
        in_tail = self._num_computed - self.num_committed * pool.block_size
        if self._leaves_tails and 0 < in_tail < pool.block_size:
            pool.leave_tail(self.blocks[self.num_committed], self._chain, self.num_committed, in_tail)
        pool.free(self.blocks)
        self.blocks = []

    @property
    def _leaves_tails(self) -> bool:
        return self._cache.reuses_tails and self.context_exact and not self._collided


class PrefixCache:
    """Finds the longest cached prefix of a chain in a pool.

    alignment: hits are rounded down to a multiple of this many tokens, the unit in which prefill gives the same bits
    wherever a run of it begins. uniform: decode steps give those bits, too, and so does any part of a unit; where a
    unit is a block, a hit then goes on into the partial block that a sequence left behind.
    exact: reuse only blocks that are bit-equal to a cold prefill.
    enabled: False finds nothing and commits nothing.
    """

    def __init__(
        self, pool: BlockPool, *, alignment: int, uniform: bool = False, exact: bool = False, enabled: bool = True
    ) -> None:
        if alignment < 1 or alignment % pool.block_size:
            raise ConfigError(f"alignment {alignment} must be a positive multiple of the block size {pool.block_size}")
        self.pool = pool
        self.alignment = alignment
        self.uniform = uniform
        self.exact = exact
        self.enabled = enabled

    @property
    def reuses_tails(self) -> bool:
        """Whether a hit goes on into a partial block."""
        return self.enabled and self.uniform and self.alignment == self.pool.block_size

    def usable_blocks(self, chain: Chain) -> int:
        """How many of a chain's blocks could be reused at most: its last token's logits are what the caller wants."""
        return (len(chain) - 1) // self.pool.block_size

    def whole(self, num_blocks: int) -> int:
        """Rounded down to whole alignment units."""
        unit = self.alignment // self.pool.block_size
        return num_blocks // unit * unit

    def match(self, chain: Chain, start: int = 0) -> Match:
        """The cached blocks from the one with token ``start`` on, not rounded, and why no more. Holds nothing."""
        if not self.enabled:
            return Match([], MatchEnd.OFF)
        first, stop = start // self.pool.block_size, self.usable_blocks(chain)
        return self.pool.match(chain, start=first, stop=stop, exact_only=self.exact)

    def tail(self, chain: Chain, position: int) -> tuple[Block, int] | None:
        """See `BlockPool.find_tail`; None where partial blocks are not reused."""
        return self.pool.find_tail(chain, position) if self.reuses_tails else None

    def find(self, chain: Chain, start: int = 0) -> Sequence[Block]:
        """The cached blocks from the one with token ``start`` on; whole alignment units only.

        At least the chain's last token is left to compute. Holds nothing.
        """
        blocks = self.match(chain, start).blocks
        return blocks[: self.whole(len(blocks))]

    def acquire(self, chain: Chain) -> Lease:
        """Match and pin; the caller allocates afterwards, so nobody evicts what was just found."""
        return self.lease(chain, self.find(chain))

    def lease(self, chain: Chain, found: Sequence[Block]) -> Lease:
        """Pin what `find` has just found for ``chain``."""
        self.pool.pin(found)
        return Lease(self, chain, list(found))
