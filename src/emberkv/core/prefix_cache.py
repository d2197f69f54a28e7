"""The prefix cache: match, pin, and hand out a lease; everything a sequence does to blocks goes through its lease.

tokens   0 ............... full ....... hit ............... len
         |  shared: found  |  copied: the  |  ours: computed,  |
         |  and pinned     |  beginning of |  then committed   |
         |                 |  a block      |  as blocks fill   |
"""

from collections.abc import Iterable, Sequence

from emberkv.core.block import Block, BlockCopy, BlockState, Match, MatchEnd
from emberkv.core.block_pool import BlockPool
from emberkv.core.checkpoints import BRANCH_TOKENS, CheckpointKind, checkpoint_positions
from emberkv.core.hashing import Chain
from emberkv.errors import ConfigError


class Lease:
    """One sequence's hold on blocks: the block table, in chain order. Release it exactly once, on any way out.

    Where a hit may end within a block, the lease also holds the block whose beginning is to be copied, until the step
    that copies it has been computed. wanted: the numbers of tokens behind which the sequence wants a checkpoint.
    notes_use: whether going on from a checkpoint still counts as a use of it; a request counts once.
    """

    __slots__ = (
        "_branch",
        "_cache",
        "_chain",
        "_collided",
        "_num_computed",
        "_positions",
        "_prompt_end",
        "_saved",
        "_source",
        "_wanted",
        "blocks",
        "context_exact",
        "hit_tokens",
        "notes_use",
        "num_committed",
    )

    def __init__(
        self,
        cache: "PrefixCache",
        chain: Chain,
        hit: list[Block],
        *,
        reads_cache: bool = True,
        wanted: Sequence[int] = (),
    ) -> None:
        self._cache = cache
        self._chain = chain
        self._collided = False
        self.blocks = hit
        self.num_committed = len(hit)
        self.hit_tokens = len(hit) * cache.pool.block_size
        self.context_exact = all(block.exact for block in hit)
        self._num_computed = self.hit_tokens
        self._source: Block | None = None
        self._wanted = wanted
        self._positions: list[int] = []
        self._branch = 0
        self._prompt_end = len(chain) - 1
        self._saved = 0
        self.notes_use = True
        if reads_cache:
            self._reuse_beginning()

    @property
    def checkpoint(self) -> int | None:
        """The token at which a prefill chunk is to end, so that the block can be left to others as it is then; None:
        there is no such token.
        """
        return self._positions[0] if self._positions else None

    @property
    def pinned(self) -> list[Block]:
        """Every block that the lease holds: the block table, and the block to copy from."""
        return self.blocks if self._source is None else [*self.blocks, self._source]

    @property
    def copy(self) -> BlockCopy | None:
        """What is to be copied before the first of the sequence's tokens is computed; None when that is done."""
        if self._source is None:
            return None
        count = self._num_computed % self._cache.pool.block_size
        return BlockCopy(self._source, self.blocks[self.num_committed], count)

    def copy_before(self, start: int) -> BlockCopy | None:
        """`copy`, for the chunk from token ``start`` on; None for the chunks behind it in the same step."""
        return self.copy if start == self._num_computed else None

    def _reuse_beginning(self) -> None:
        """Let the hit go on into the block behind the committed ones, as far as a cached block begins like it."""
        found = self._cache.longest_child(self._chain, self.num_committed)
        if found is not None:
            self._source, tokens = found
            self._cache.pool.pin([self._source])
            if self._cache.keeps_branches:
                self._saved = self._cache.pool.cached.saved_by(self._chain, self.num_committed, tokens)
            self.context_exact = self.context_exact and self._source.exact
            self.hit_tokens += tokens
            self._num_computed += tokens
        if self._cache.keeps_branches:
            self._cache.pool.speculative.missing(self._chain.block_hashes, self.num_committed)
            self._branch = self._cache.branch(self._chain, self.num_committed)
            self._find_positions()

    def _find_positions(self) -> None:
        wanted = {self._branch, *self._wanted}
        self._positions = self._cache.checkpoint_positions(wanted, self._num_computed, len(self._chain))

    def _release_source(self) -> None:
        if self._source is not None:
            self._cache.pool.free([self._source])
            self._source = None
            self._saved = 0

    def missing_blocks(self, num_tokens: int) -> int:
        """How many blocks more the table needs to cover ``num_tokens``."""
        missing = -(-num_tokens // self._cache.pool.block_size) - len(self.blocks)
        return missing if missing > 0 else 0

    def extend(self, num_tokens: int) -> None:
        """Allocate until the table covers ``num_tokens``. Raises NoFreeBlocksError, with no block allocated.

        If the block to copy from is one of those that are needed, it is not copied, and the hit ends before it.
        """
        missing = self.missing_blocks(num_tokens)
        if not missing:
            return
        pool, owner = self._cache.pool, self._chain.owner(len(self.blocks) + missing - 1)
        if self._source is not None and len(self.blocks) == self.num_committed and missing > pool.free_for(owner):
            self._release_source()
            self.context_exact = all(block.exact for block in self.blocks)
            self.hit_tokens = self._num_computed = len(self.blocks) * pool.block_size
            if self._cache.keeps_branches:
                self._find_positions()
        self.blocks += pool.allocate(missing, owner)

    def adopt(self, start: int) -> int:
        """Reuse what others committed since, from token ``start`` on, the next to compute.

        Whole alignment units are shared as in `acquire`, and our own blocks for that stretch are freed; the beginning
        of one more block may be copied. Both only once all before ``start`` is committed. Returns the number of tokens.
        """
        pool = self._cache.pool
        first = start // pool.block_size
        if self.num_committed < first:
            return 0
        before = self.hit_tokens
        found = self._cache.find(self._chain, start)
        if found:
            self._release_source()
            pool.pin(found)
            pool.free(self.blocks[first : first + len(found)])
            self.blocks[first : first + len(found)] = found
            self.num_committed = first + len(found)
            self._positions = []
            self.context_exact = self.context_exact and all(block.exact for block in found)
            self._num_computed = self.num_committed * pool.block_size
            self.hit_tokens += self._num_computed - start
        is_next = bool(found) or start == self._num_computed  # not behind a chunk of the same block in the same step
        if is_next and self._num_computed == self.num_committed * pool.block_size:
            self._reuse_beginning()
        return self.hit_tokens - before

    def commit_prefilled(self, stop: int, *, has_room: bool = True) -> None:
        """Commit the blocks that are complete now that prefill has computed all tokens up to ``stop``.

        has_room: as for `cut`, as of now.

        What a whole alignment unit holds is what a cold run computes, if all before it is; the rest may not be, unless
        the engine is batch-invariant.
        """
        if self._saved and self._source is not None and self.notes_use:  # now the copy has been made
            self._cache.pool.note_use(self._source, self._saved)
            self.notes_use = False
        self._release_source()
        whole = stop if self._cache.batch_invariant else stop - stop % self._cache.alignment
        self._commit(whole, exact=True)
        if stop > whole:
            self._commit(stop, exact=False)
        if stop == self.checkpoint:
            del self._positions[0]
            if has_room:
                self._leave_checkpoint(stop)

    def cut(self, start: int, stop: int, *, has_room: bool) -> int:
        """Where a prefill chunk from token ``start`` on ends that may go up to ``stop``: there, or at a checkpoint.

        has_room: for the block in which the sequence then goes on; without it there is no checkpoint.
        """
        while self._positions and start < self._positions[0] <= stop:
            at = self._positions[0]
            owner = self._chain.owner(at // self._cache.pool.block_size)
            if has_room and self._cache.pool.speculative.is_worth(owner, self._kind(at)):
                return at
            del self._positions[0]
        return stop

    def _kind(self, at: int) -> CheckpointKind:
        if at == self._branch:
            return CheckpointKind.BRANCH
        return CheckpointKind.PROMPT_END if at == self._prompt_end else CheckpointKind.HINT

    def _leave_checkpoint(self, stop: int) -> None:
        """Commit the last block as a checkpoint and continue the sequence in a copy of it, if a block is free for that.

        The copy is made before the next chunk, like that of a block which another sequence has left.
        """
        pool, at = self._cache.pool, self.num_committed
        owner, count = self._chain.owner(at), stop - at * pool.block_size
        if self._collided or not self.context_exact:
            return
        kind = self._kind(stop)
        known = pool.cached.known_partial(self._chain, at, count)
        if known is not None:
            pool.keep_partial(known, kind)
            return
        if kind is not CheckpointKind.BRANCH and not pool.admit_speculative(owner):
            return
        if not pool.free_for(owner):
            return
        fresh = pool.allocate(1, owner)
        pool.commit_partial(self.blocks[at], self._chain, at, count, kind)
        pool.stats.branch_checkpoints += kind is CheckpointKind.BRANCH
        self._source = self.blocks[at]
        self.blocks[at] = fresh[0]

    def commit_decoded(self, stop: int) -> None:
        """Commit the blocks that are complete now that a decode step has computed the last token before ``stop``."""
        if stop < (self.num_committed + 1) * self._cache.pool.block_size:  # none is full, as after most decode steps
            self._num_computed = stop
            self.context_exact = self.context_exact and self._cache.batch_invariant
        else:
            self._commit(stop, exact=self._cache.batch_invariant)

    def _commit(self, num_computed: int, *, exact: bool) -> None:
        """A collision ends it for good: the hashes of all that follows belong to the other chain as well."""
        self._num_computed = num_computed
        self.context_exact = self.context_exact and exact
        pool = self._cache.pool
        if num_computed < (self.num_committed + 1) * pool.block_size:
            return  # no block is full
        if self._collided or not self._cache.enabled:
            return
        full, table = num_computed // pool.block_size, self.blocks
        while (position := self.num_committed) < full:
            count = pool.commit_new(table, self._chain, position, full, exact=self.context_exact)
            if not count:
                block = pool.commit(table[position], self._chain, position, exact=self.context_exact)
                if block.state is not BlockState.COMMITTED:
                    self._collided = True
                    return
                table[position] = block
                count = 1
            self.num_committed += count

    def release(self, *, step_failed: bool = False) -> None:
        """Free every block, the last first. A last block that is not full stays cached with what is computed of it.

        step_failed: a step may have written to the last block without having been accounted for. That changes no key
        or value of earlier tokens, but a state that is kept after the last one alone.
        """
        pool = self._cache.pool
        count = self._num_computed - self.num_committed * pool.block_size
        intact = self._cache.within_blocks or not step_failed
        if intact and self._commits_partial_blocks and 0 < count < pool.block_size:
            pool.commit_partial(self.blocks[self.num_committed], self._chain, self.num_committed, count)
        self._release_source()
        pool.free(self.blocks)
        self.blocks = []

    @property
    def _commits_partial_blocks(self) -> bool:
        """Whether the last block holds what `_num_computed` says, bit-equal to a cold prefill, under its own hash."""
        copied = self._source is None
        return self._cache.reuses_partial_blocks and copied and self.context_exact and not self._collided


class PrefixCache:
    """Finds the longest cached prefix of a chain in a pool.

    alignment: hits are rounded down to a multiple of this many tokens, the unit in which prefill gives the same bits
    wherever a run of it begins. batch_invariant: the engine is batch-invariant; decode steps give those bits, too, and
    so does any part of a unit. Where a unit is a block, a hit then ends at any token: the beginning of the next block
    is copied from the cached block that begins with the same tokens. exact: reuse only blocks that are bit-equal to a
    cold prefill. enabled: False finds nothing and commits nothing.

    within_blocks: False where a block holds some state after its last token alone. Then a partial block is a
    *checkpoint*: it is copied whole, and only if all of its tokens are the prompt's next ones. Sequences leave one
    where they end, and within a prompt where it leaves what is known (see `branch`) and where it is wanted, if it saves
    at least ``branch_tokens``.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        alignment: int,
        batch_invariant: bool = False,
        within_blocks: bool = True,
        exact: bool = False,
        enabled: bool = True,
        branch_tokens: int = BRANCH_TOKENS,
    ) -> None:
        if alignment < 1 or alignment % pool.block_size:
            raise ConfigError(f"alignment {alignment} must be a positive multiple of the block size {pool.block_size}")
        if branch_tokens < 1:
            raise ConfigError(f"branch_tokens is {branch_tokens}; a checkpoint must save at least 1 token")
        self.pool = pool
        self.alignment = alignment
        self.batch_invariant = batch_invariant
        self.exact = exact
        self.enabled = enabled
        self.within_blocks = within_blocks
        self.branch_tokens = branch_tokens
        self.reuses_partial_blocks = enabled and batch_invariant and alignment == pool.block_size
        self.keeps_branches = self.reuses_partial_blocks and not within_blocks
        if self.reuses_partial_blocks:
            pool.index_children(copied_whole=not within_blocks, least_speculative=branch_tokens)

    @property
    def hit_unit(self) -> int:
        """Hits are rounded down to a multiple of this many tokens, unless they go on from a checkpoint."""
        return 1 if self.reuses_partial_blocks and self.within_blocks else self.alignment

    @property
    def takes_borders(self) -> bool:
        """Whether a checkpoint may be worth its block within a prompt, where its caller expects others to part."""
        return self.keeps_branches and self.branch_tokens < self.pool.block_size

    @property
    def kept_unit(self) -> int:
        """Of a sequence that has ended, longer ones that begin with it hit a multiple of this many tokens."""
        return 1 if self.reuses_partial_blocks else self.alignment

    def usable_blocks(self, chain: Chain) -> int:
        """How many of a chain's blocks could be reused at most: its last token's logits are what the caller wants."""
        return (len(chain) - 1) // self.pool.block_size

    def whole(self, num_blocks: int) -> int:
        """Rounded down to whole alignment units."""
        unit = self.alignment // self.pool.block_size
        return num_blocks // unit * unit

    def cached_tokens(self, chain: Chain) -> int:
        """How many of the chain's tokens a longer chain that begins with it would find in the pool. Holds nothing."""
        if not self.enabled:
            return 0
        match = self.pool.match(chain, stop=len(chain.block_hashes), exact_only=self.exact)
        blocks = self.whole(len(match.blocks))
        child = self.longest_child(chain, blocks, to_end=True)
        return blocks * self.pool.block_size + (child[1] if child is not None else 0)

    def match(self, chain: Chain, start: int = 0) -> Match:
        """The cached blocks from the one with token ``start`` on, not rounded, and why no more. Holds nothing."""
        if not self.enabled:
            return Match([], MatchEnd.OFF)
        first, stop = start // self.pool.block_size, self.usable_blocks(chain)
        return self.pool.match(chain, start=first, stop=stop, exact_only=self.exact)

    def longest_child(self, chain: Chain, position: int, *, to_end: bool = False) -> tuple[Block, int] | None:
        """The block from which the beginning of block ``position`` can be copied, and how many tokens of it.

        See `BlockPool.longest_child`; None where hits end at blocks only.
        """
        found = self.pool.longest_child(chain, position, to_end=to_end) if self.reuses_partial_blocks else None
        return None if found is None or (self.exact and not found[0].exact) else found

    def branch(self, chain: Chain, position: int) -> int:
        """How many tokens of ``chain`` come before the one at which it leaves all that is cached, which is in block
        ``position`` or the first one behind it: other prompts may part from it there, too.

        A prompt that is cached whole leaves it before its last token, which is computed in any case.
        """
        return position * self.pool.block_size + self.pool.known_tokens(chain, position)

    def checkpoint_positions(self, wanted: Iterable[int], start: int, stop: int) -> list[int]:
        """See `checkpoints.checkpoint_positions`."""
        return checkpoint_positions(wanted, start, stop, block_size=self.pool.block_size, least=self.branch_tokens)

    def find(self, chain: Chain, start: int = 0) -> Sequence[Block]:
        """The cached blocks from the one with token ``start`` on; whole alignment units only.

        At least the chain's last token is left to compute. Holds nothing.
        """
        blocks = self.match(chain, start).blocks
        return blocks[: self.whole(len(blocks))]

    def acquire(self, chain: Chain, checkpoints: Sequence[int] = ()) -> Lease:
        """Match and pin; the caller allocates afterwards, so what was just found is not evicted."""
        return self.lease(chain, self.find(chain), checkpoints=checkpoints)

    def lease(
        self, chain: Chain, found: Sequence[Block], *, reads_cache: bool = True, checkpoints: Sequence[int] = ()
    ) -> Lease:
        """Pin what `find` has just found for ``chain``. reads_cache: False reuses no partial block, either.

        checkpoints: the numbers of tokens behind which one is wanted, where hits end at them.
        """
        if found:
            self.pool.pin(found)
        return Lease(self, chain, list(found), reads_cache=reads_cache, wanted=checkpoints)
