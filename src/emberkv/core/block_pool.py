"""The block pool: what each physical block holds, how many references it has, and what may be overwritten.

A block's life: FREE -> ALLOCATED (or PENDING, while a lower tier loads it) -> COMMITTED -> FREE, still indexed -> held
again, or evicted when its place is needed. A free block is still a cache entry, and the eviction policy is the order
in which free blocks are overwritten.
"""

from collections.abc import Iterable, Iterator, Sequence

from emberkv.core.block import Block, BlockState, Match
from emberkv.core.cached_blocks import BlockCost, CachedBlocks, uniform_cost
from emberkv.core.checkpoints import CheckpointKind, SpeculativeCheckpoints
from emberkv.core.events import AllBlocksCleared, BlockRemoved, EventLog, Snapshot
from emberkv.core.hashing import BlockHash, Chain
from emberkv.core.loading import Load, StoredPartial
from emberkv.core.policies.eviction import LRU, EvictionPolicy
from emberkv.core.pool_laws import broken_laws, require_allocated
from emberkv.core.stats import SchedulerStats
from emberkv.errors import ConfigError, IntegrityError, NoFreeBlocksError

__all__ = ["BlockCost", "BlockPool", "uniform_cost"]


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens. Not thread-safe: the engine's thread drives it.

    Conservation law, after every call: each block is FREE, PENDING, ALLOCATED or COMMITTED; a FREE block has
    no holders and is either blank or indexed and known to the policy as evictable; every other block has holders.
    `check_integrity` states it in code.

    policy: which block goes first; entries are retained through it. cached: the index of the blocks that are found.
    speculative: which of its partial blocks are speculative checkpoints. journal: keep a list of what becomes visible,
    for `take_committed`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        policy: EvictionPolicy[BlockHash] | None = None,
        block_cost: BlockCost = uniform_cost,
        events: EventLog | None = None,
        stats: SchedulerStats | None = None,
        journal: bool = False,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"a pool of {num_blocks} blocks of {block_size} tokens; both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.events = events if events is not None else EventLog()
        self.stats = stats if stats is not None else SchedulerStats()
        self.policy: EvictionPolicy[BlockHash] = policy if policy is not None else LRU()
        self.speculative = SpeculativeCheckpoints(
            num_blocks, block_size, self.stats, num_owned=self._num_owned, has_blank_for=self._has_blank_for
        )
        self.cached = CachedBlocks(
            self.policy, block_cost, self.events, self.stats, journal=journal, speculative=self.speculative
        )
        self._least_speculative = 0
        self._blocks: list[Block] = []  # by block id, those that have been made
        self._blank: list[Block] = []  # of these, the free ones that hold nothing

    @property
    def blocks(self) -> list[Block]:
        """All blocks, by block id. Each is otherwise made when it is first allocated: large pools are rarely full."""
        self._make(self.num_blocks - len(self._blocks))
        return self._blocks

    @property
    def num_free(self) -> int:
        """Blocks without a holder, cached ones included."""
        return self.num_blocks - len(self._blocks) + len(self._blank) + len(self.policy)

    def free_for(self, owner: str) -> int:
        """Of the free blocks, those that ``owner`` may have: others keep what their floors guarantee them."""
        return self.num_blocks - len(self._blocks) + len(self._blank) + self.policy.available_to(owner)

    @property
    def max_sequence_blocks(self) -> int:
        """How many blocks a sequence of any owner can have when no other sequence runs, however full the floors are."""
        return max(0, self.num_blocks - self.policy.reserved(self.cached.block_cost(0).size))

    def guaranteed_to(self, owner: str) -> int:
        """How many blocks ``owner``'s floor keeps from others once it has them."""
        return self.policy.guaranteed(owner, self.cached.block_cost(0).size)

    @property
    def num_evictable(self) -> int:
        """Of the free blocks, those that are still a cache entry."""
        return len(self.policy)

    @property
    def num_cached(self) -> int:
        """Full blocks found under a block hash, held or not."""
        return self.cached.num_full

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks ``num_tokens`` take."""
        return -(-num_tokens // self.block_size)

    def lookup(self, block_hash: BlockHash) -> Block | None:
        return self.cached.index.get(block_hash)

    def match(self, chain: Chain, *, start: int = 0, stop: int, exact_only: bool = False) -> Match:
        """The longest consecutive run of cached blocks of ``chain[start:stop]`` (in blocks). Holds nothing.

        A block is a hit only if its tokens equal the chain's, whatever its block hash says.
        """
        return self.cached.match(chain, start, stop, exact_only=exact_only)

    def index_children(self, *, copied_whole: bool = False, least_speculative: int = 0) -> None:
        """Keep cached blocks by their parent, too, as `longest_child` and `commit_partial` need it. Idempotent.

        copied_whole: a sequence goes on from a block only behind the last token that the block holds, not from its
        beginning. So a partial block stays useful beside a longer one that begins with it. least_speculative: the
        fewest tokens with which it does; 0: it never does.
        """
        self._least_speculative = least_speculative if copied_whole else 0
        self.cached.index_children(copied_whole=copied_whole)

    def longest_child(self, chain: Chain, position: int, *, to_end: bool = False) -> tuple[Block, int] | None:
        """Of the cached blocks behind the first ``position`` blocks of ``chain``, full or partial, the one that begins
        with most of the tokens that follow there, and how many these are. Holds nothing.

        At least one token, at most all of a block but the last, and not the chain's last token unless ``to_end``. None
        where there is no such block, and without `index_children`. Where blocks are copied whole, only partial blocks
        count, and only those all of whose tokens follow there.
        """
        start, stop = self._behind(chain, position, to_end=to_end)
        if self.cached.copied_whole:
            return self.cached.longest_checkpoint(chain, start, stop)
        return self.cached.longest_child(chain, start, stop)

    def known_tokens(self, chain: Chain, position: int) -> int:
        """How many of the tokens behind the first ``position`` blocks of ``chain``, without its last one, a cached
        block begins with, whether a sequence can go on from there or not.
        """
        found = self.cached.longest_child(chain, *self._behind(chain, position, to_end=False))
        return 0 if found is None else found[1]

    def _behind(self, chain: Chain, position: int, *, to_end: bool) -> tuple[int, int]:
        start = position * self.block_size
        return start, min(start + self.block_size - 1, len(chain) if to_end else len(chain) - 1)

    def commit_partial(
        self, block: Block, chain: Chain, position: int, count: int, kind: CheckpointKind | None = None
    ) -> bool:
        """Make block ``position`` of ``chain`` visible with its first ``count`` tokens, which are computed and exact.

        The caller is about to free it and writes to it no more. Nothing happens, and False is returned, if a sequence
        can go on behind these tokens from a cached block; a partial block that they go on from is forgotten, unless it
        is to be kept. kind: why it is kept itself when it is extended; None: it is not. Needs `index_children`.
        """
        committed = self._commit_partial(block, chain, position, count, kind, public=False)
        if committed and kind in (None, CheckpointKind.BRANCH):  # any other once it is used
            self._record_checkpoint(block)
        return committed

    def _commit_partial(
        self, block: Block, chain: Chain, position: int, count: int, kind: CheckpointKind | None, *, public: bool
    ) -> bool:
        require_allocated(block)
        if self.cached.known_partial(chain, position, count) is not None:
            return False
        start = position * self.block_size
        shorter = self.cached.partial_prefix(chain, start, start + count, public=public)
        block.state = BlockState.COMMITTED
        self.cached.enter_partial(block, chain, position, count, keep=kind is not None, public=public)
        if kind is not None and kind is not CheckpointKind.BRANCH:
            self.speculative.add(block, kind)
        if shorter is not None:
            self._supersede(shorter)  # only now that the block itself counts to the limit
        return True

    def _record_checkpoint(self, block: Block) -> None:
        """Keep a checkpoint for `take_committed`, unless it saves too little to be loaded."""
        if self.cached.keeps_journal and 0 < self._least_speculative <= block.num_tokens:
            self.cached.record_committed(block)

    def keep_partial(self, block: Block, kind: CheckpointKind) -> None:
        """A sequence would leave a checkpoint behind the last token of a cached partial block; see `commit_partial`."""
        if kind is CheckpointKind.BRANCH:
            if self.speculative.confirm(block):
                self._record_checkpoint(block)
            block.keep_when_extended = True
        elif not block.keep_when_extended and not block.retained and self.speculative.allows(block.owner):
            block.keep_when_extended = True
            self.speculative.add(block, kind)

    def admit_speculative(self, owner: str) -> bool:
        """Whether ``owner`` may have one more speculative checkpoint; at its limit, its oldest one is dropped first."""
        return self.speculative.allows(owner) or self._drop_speculative(owner)

    def _has_blank_for(self, owner: str) -> bool:
        """Whether a block holds nothing that ``owner`` may have and keep."""
        return self.num_free > len(self.policy) and self.policy.headroom(owner) >= self.cached.block_cost(0).size

    def _num_owned(self, owner: str) -> float:
        owned = self.policy.bytes_of(owner)
        return len(self.cached.index) if owned is None else owned / self.cached.block_cost(0).size

    def _drop_speculative(self, owner: str) -> bool:
        """Forget the oldest speculative checkpoint of ``owner``, if there is one that may go."""
        if (oldest := self.speculative.of(owner).oldest()) is not None:
            self._withdraw(oldest)
        return oldest is not None

    def _evict_surplus(self) -> None:
        """What quotas forbid to keep becomes blank: an owner's speculative checkpoints beyond its limit first."""
        if not self.policy.over_quota():
            return
        for owner in list(self.policy.over_quota()):
            while owner in self.policy.over_quota() and self.speculative.of(owner).is_too_large:
                if not self._drop_speculative(owner):
                    break
        self._blank += self.cached.evict_surplus()

    def note_use(self, block: Block, tokens: int) -> None:
        """A sequence has gone on from this partial block, which is copied whole. tokens: how many that saves."""
        self.stats.checkpoint_hits += 1
        if self.speculative.used(block, tokens):
            self._record_checkpoint(block)

    def retain(self, block_hashes: Iterable[BlockHash], until: float) -> int:
        """As `EvictionPolicy.retain`. A longer partial block does not take the place of one among them, either."""
        wanted = list(block_hashes)
        for block in self._partial_among(wanted):
            block.retained = True
            if self.speculative.confirm(block):  # a retained one is not dropped for others
                self._record_checkpoint(block)
        return self.policy.retain(wanted, until)

    def unretain(self, block_hashes: Iterable[BlockHash]) -> None:
        """As `EvictionPolicy.unretain`, and undoes the rest of `retain`."""
        wanted = list(block_hashes)
        for block in self._partial_among(wanted):
            block.retained = False
        self.policy.unretain(wanted)

    def _partial_among(self, block_hashes: Iterable[BlockHash]) -> Iterator[Block]:
        """Partial blocks, if blocks are copied whole: otherwise a longer one has all that a shorter one has."""
        if self.cached.copied_whole:
            found = (self.lookup(block_hash) for block_hash in block_hashes)
            yield from (block for block in found if block is not None and block.partial)

    def pin(self, blocks: Iterable[Block]) -> None:
        """Add a reference to each of these cached blocks, so that they are not evicted."""
        taken, hits = [], []
        committed = BlockState.COMMITTED
        for block in blocks:
            block_hash = block.block_hash
            assert block_hash is not None
            if block.ref_count == 0:
                block.state = committed
                taken.append(block_hash)
            block.ref_count += 1
            hits.append(block_hash)
        self.policy.hold(taken)
        self.policy.access(hits)

    def allocate(self, count: int, owner: str = "") -> list[Block]:
        """``count`` blocks for one holder, blank ones first, then by evicting what has to go for ``owner``.

        Raises NoFreeBlocksError when fewer are free for the owner; then nothing has changed.
        """
        if count > self.free_for(owner):
            raise NoFreeBlocksError(f"{count} blocks asked for, {self.free_for(owner)} of {self.num_blocks} are free")
        short = count - len(self._blank)
        if short > 0 and len(self._blocks) < self.num_blocks:
            short -= self._make(min(short, self.num_blocks - len(self._blocks)))
        if short > 0 and (speculative := self.speculative.known(owner)) is not None:
            while short > 0 and speculative.is_too_large and self._drop_speculative(owner):
                short -= 1
        if short > 0:
            self._blank += self.cached.evict(short, owner)
        first = len(self._blank) - count
        allocated = self._blank[first:]
        del self._blank[first:]
        allocated.reverse()
        state = BlockState.ALLOCATED
        for block in allocated:
            block.state = state
            block.ref_count = 1
        return allocated

    def commit(self, block: Block, chain: Chain, position: int, *, exact: bool) -> Block:
        """Make a complete block visible as block ``position`` of ``chain``; returns the block to hold from now on.

        If the block hash is known already, the known block is kept and ours freed, unless ours is exact and the known
        one is not: then ours takes the place. If the known one has other tokens, ours stays private.
        """
        require_allocated(block)
        kept = self._commit(block, chain, position, exact)
        if self.cached.keeps_journal:
            self.cached.record_committed(block)
        return kept

    def commit_new(self, table: Sequence[Block], chain: Chain, start: int, stop: int, *, exact: bool) -> int:
        """`commit` for the first of blocks ``[start, stop)`` of ``chain``, as far as their hashes are not known yet.

        table: the chain's block table, from its first block on. Returns how many were committed; what follows them is
        for `commit`. Most blocks of a prefill chunk are new, and together they cost much less than one by one.
        """
        cached, index, block_hashes = self.cached, self.cached.index, chain.block_hashes
        allocated, committed = BlockState.ALLOCATED, BlockState.COMMITTED
        end = start
        while end < stop and block_hashes[end] not in index and table[end].state is allocated:
            end += 1
        if end == start:
            return 0
        if exact and cached.children is not None:
            for position in range(start, end):
                self._supersede_before(chain, position)
        blocks = table[start:end]
        for block in blocks:
            block.state = committed
        cached.enter(blocks, chain, start, exact=exact)
        self._evict_surplus()
        if cached.keeps_journal:
            for block in blocks:
                cached.record_committed(block)
        return end - start

    def _commit(self, block: Block, chain: Chain, position: int, exact: bool) -> Block:
        known = self.cached.index.get(chain.block_hashes[position])
        if known is not None:
            if known.tokens != chain.block_tokens(position):
                self.stats.collisions += 1
                return block
            if known.exact or not exact:
                self.stats.duplicate_blocks += 1
                self.pin([known])
                self.free([block])
                return known
            self.stats.replaced_blocks += 1
            self._withdraw(known)
        if exact and self.cached.children is not None:
            self._supersede_before(chain, position)
        block.state = BlockState.COMMITTED
        self.cached.enter([block], chain, position, exact=exact, in_place=known is not None)
        self._evict_surplus()
        return block

    def free(self, blocks: Sequence[Block]) -> None:
        """Drop one reference to each of these blocks, which are listed in chain order.

        The tail becomes evictable first, so that a chain loses its end before the prefix that others may share.
        """
        released, blank, free = [], self._blank, BlockState.FREE
        for block in reversed(blocks):
            holders = block.ref_count - 1
            if holders < 0:
                raise IntegrityError(f"block {block.block_id} is freed but has no holder")
            block.ref_count = holders
            if not holders:
                block.state = free
                block_hash = block.block_hash
                if block_hash is None:
                    blank.append(block)
                else:
                    released.append(block_hash)
        self.policy.release(released)
        self._evict_surplus()

    def reserve_for_load(self, count: int, owner: str = "") -> list[Block]:
        """``count`` blocks whose content a lower tier will bring. Raises NoFreeBlocksError as `allocate` does."""
        blocks = self.allocate(count, owner)
        for block in blocks:
            block.state = BlockState.PENDING
        return blocks

    def complete_load(self, blocks: Sequence[Block], chain: Chain, start: int, exact: Sequence[bool]) -> int:
        """End the wait for ``blocks``, which are those of ``chain`` from block ``start`` on, and release them.

        exact: of the leading ones whose content is in place, each; these become visible. All others go back. Returns
        how many are found now: what was revoked since, or collides, ends the run.
        """
        wanted = [block.state is BlockState.PENDING for block in blocks]
        for block in blocks:
            block.state = BlockState.ALLOCATED
        held = list(blocks)
        count = 0
        while count < len(exact) and wanted[count]:
            held[count] = self._commit(held[count], chain, start + count, exact[count])
            if held[count].block_hash is None:
                break
            count += 1
        self.free(held)
        return count

    def complete_partial_load(self, load: Load, partial: StoredPartial, *, arrived: bool) -> bool:
        """As `complete_load`, of a load's last block, which is ``partial``.

        arrived: its content is in place and exact. Whether it is found now, and no other block in its stead.
        """
        block = load.blocks[-1]
        is_wanted = arrived and block.state is BlockState.PENDING
        block.state = BlockState.ALLOCATED
        kind = CheckpointKind.BRANCH if load.keep_when_extended else None
        found = is_wanted and self._commit_partial(
            block, load.chain, load.stop, partial.count, kind, public=partial.public
        )
        self.free([block])
        return found

    def cancel_load(self, blocks: Iterable[Block]) -> None:
        """What is being loaded into these blocks is not wanted any more: it will not become visible."""
        for block in blocks:
            if block.state is BlockState.PENDING:
                block.state = BlockState.ALLOCATED

    def take_committed(self) -> list[Block]:
        """What was committed since the last call and is still found, without what a load brought in.

        Of partial blocks only those that are copied whole: not the speculative ones, until they are used, nor those
        with fewer tokens than `index_children` says.
        """
        return self.cached.take_committed()

    def remove(self, block_hashes: Iterable[BlockHash]) -> int:
        """Forget these blocks, as `clear` forgets all; how many full ones there were.

        The partial blocks behind them go as well, and those beside them, which may begin with the same tokens. Where a
        block is not cached any more, the latter are named by a `partial_siblings_hash`.
        """
        wanted = list(block_hashes)
        self.speculative.forget_evicted(wanted)
        blocks = self.cached.among(wanted)
        gone = tuple(block.block_hash for block in blocks if block.block_hash is not None and not block.partial)
        if gone:
            self.events.append(BlockRemoved(gone, evicted=False))
        for block in blocks:
            self._withdraw(block)
        return len(gone)

    def clear(self) -> None:
        """Forget every cached block, and what is being loaded. Held blocks stay with their holders, as private ones."""
        for block in list(self.cached.index.values()):
            self._withdraw(block)
        self.speculative.forget_all_evicted()
        self.cancel_load(self._blocks)
        self.events.append(AllBlocksCleared())

    def cached_hashes(self) -> list[BlockHash]:
        """The hashes of all cached blocks, partial ones included; copied in one go, without a look at the blocks."""
        return list(self.cached.index)

    def snapshot(self) -> Snapshot:
        return self.cached.snapshot()

    def _make(self, count: int) -> int:
        """Make the next ``count`` blocks, which are blank; they are allocated after the other blank ones."""
        first = len(self._blocks)
        made = [Block(block_id) for block_id in range(first, first + count)]
        self._blocks += made
        self._blank[:0] = made[::-1]
        return count

    def _supersede(self, shorter: Block) -> None:
        """Forget a partial block: a longer block that begins with its tokens is found now.

        Not one that is kept, nor a retained one: other prompts go on from it, and blocks are copied whole. Any other
        becomes speculative, if one more is allowed: its prompt's next message may be written anew.
        """
        if shorter.keep_when_extended or shorter.retained:
            return
        owner, kind = shorter.owner, CheckpointKind.ANSWER_END
        is_long = 0 < self._least_speculative <= shorter.num_tokens
        if is_long and self.speculative.allows(owner) and self.speculative.is_worth(owner, kind):
            shorter.keep_when_extended = True
            self.speculative.add(shorter, kind)
        else:
            self._withdraw(shorter)

    def _supersede_before(self, chain: Chain, position: int) -> None:
        """`_supersede` the partial block that full block ``position`` of ``chain`` begins with, if there is one."""
        start = position * self.block_size
        if (shorter := self.cached.partial_prefix(chain, start, start + self.block_size)) is not None:
            self._supersede(shorter)

    def _withdraw(self, block: Block) -> None:
        self.cached.unindex(block)
        if block.ref_count:
            block.state = BlockState.ALLOCATED
        else:
            self._blank.append(block)

    def check_integrity(self, holders: Iterable[Iterable[Block]] | None = None) -> None:
        """Raise IntegrityError unless the conservation law holds.

        holders: the blocks of every live lease and load; with it, each ref count must be explained by them.
        """
        broken = broken_laws(
            self.blocks, self._blank, self.cached.index, len(self.policy), holders, self.cached.children
        )
        if not self.speculative.is_part_of(self.cached.index):
            broken.append("a speculative checkpoint is not cached, or what is cached counts as evicted")
        if broken:
            raise IntegrityError("; ".join(broken[:5]))
