"""The cached blocks of a pool: found under their hashes, compared by their tokens, evicted in a policy's order."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from emberkv.core.block import Block, Match, MatchEnd
from emberkv.core.checkpoints import SpeculativeCheckpoints
from emberkv.core.events import BlockRemoved, BlockStored, EventLog, Snapshot
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain, partial_hash, partial_siblings_hash
from emberkv.core.policies.eviction import EntryCost, EvictionPolicy
from emberkv.core.stats import SchedulerStats

BlockCost = Callable[[int], EntryCost]
"""The eviction block_cost of a block at a position in its chain."""

_UNIFORM = EntryCost()


def uniform_cost(position: int) -> EntryCost:
    """Every block alike."""
    return _UNIFORM


_BY_TOKENS = attrgetter("tokens")


class ChildIndex:
    """Cached blocks by the hash of their parent, each list sorted by the blocks' encoded tokens.

    Of all children of a block, the one with the longest common prefix with a run of tokens is then next to the place
    where that run itself would be: finding it takes one binary search and two comparisons.
    """

    def __init__(self) -> None:
        self._children: dict[BlockHash, list[Block]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._children.values()))

    def __contains__(self, block: Block) -> bool:
        return block in self._children.get(block.parent, ())  # blocks are equal only to themselves

    def add(self, block: Block) -> None:
        siblings = self._children.get(block.parent)
        if siblings is None:
            self._children[block.parent] = [block]
        else:
            siblings.insert(bisect_left(siblings, block.tokens, key=_BY_TOKENS), block)

    def discard(self, block: Block) -> None:
        siblings = self._children[block.parent]
        if len(siblings) == 1:
            del self._children[block.parent]
            return
        at = bisect_left(siblings, block.tokens, key=_BY_TOKENS)
        while siblings[at] is not block:
            at += 1
        del siblings[at]

    def neighbours(self, parent: BlockHash, tokens: bytes) -> list[Block]:
        """Of the children of ``parent``, the one just before ``tokens`` and the one at or just after them."""
        siblings = self._children.get(parent)
        if siblings is None:
            return []
        at = bisect_left(siblings, tokens, key=_BY_TOKENS)
        return siblings[max(0, at - 1) : at + 1]

    def last_up_to(self, parent: BlockHash, tokens: bytes) -> Block | None:
        """Of the children of ``parent``, the last one that is not after ``tokens``."""
        siblings = self._children.get(parent, ())
        at = bisect_right(siblings, tokens, key=_BY_TOKENS)
        return siblings[at - 1] if at else None

    def has(self, parent: BlockHash) -> bool:
        """Whether ``parent`` has any."""
        return parent in self._children

    def of(self, parent: BlockHash) -> list[Block]:
        """The children of ``parent``, by their tokens."""
        return self._children.get(parent, [])


class CachedBlocks:
    """The index from hashes to blocks. References and blank blocks are the pool's part.

    policy: knows every block that is found, as held or as released. journal: keep a list of what was committed.
    """

    def __init__(
        self,
        policy: EvictionPolicy[BlockHash],
        block_cost: BlockCost,
        events: EventLog,
        stats: SchedulerStats,
        *,
        journal: bool,
        speculative: SpeculativeCheckpoints,
    ) -> None:
        self.policy = policy
        self.block_cost = block_cost
        self.index: dict[BlockHash, Block] = {}
        self.children: ChildIndex | None = None
        self.copied_whole = False  # see `BlockPool.index_children`
        self._partial: dict[BlockHash, set[BlockHash]] = {}  # hashes of partial blocks, by `Block.previous`
        self._partial_children = ChildIndex()
        self._parents: dict[BlockHash, BlockHash] = {}  # of partial blocks, by `partial_siblings_hash`
        self._num_partial = 0
        self._speculative = speculative
        self._events = events
        self._stats = stats
        self.keeps_journal = journal
        self._journal: dict[BlockHash, Block] = {}

    @property
    def num_full(self) -> int:
        return len(self.index) - self._num_partial

    def match(self, chain: Chain, start: int, stop: int, *, exact_only: bool) -> Match:
        """See `BlockPool.match`."""
        index = self.index
        block_hashes = chain.block_hashes
        found: list[Block] = []
        for position in range(start, stop):
            block = index.get(block_hashes[position])
            if block is None:
                return Match(found, MatchEnd.ABSENT)
            if block.tokens != chain.block_tokens(position):
                self._stats.collisions += 1
                return Match(found, MatchEnd.TOKENS_DIFFER)
            if exact_only and not block.exact:
                return Match(found, MatchEnd.INEXACT)
            found.append(block)
        return Match(found, MatchEnd.LIMIT)

    def index_children(self, *, copied_whole: bool) -> None:
        """See `BlockPool.index_children`."""
        self.copied_whole = copied_whole
        if self.children is None:
            self.children = ChildIndex()
            for block in self.index.values():
                self.children.add(block)

    def longest_child(self, chain: Chain, start: int, stop: int) -> tuple[Block, int] | None:
        """The cached block that begins with most of tokens ``[start, stop)``, which are of one block, and how many."""
        if self.children is None or stop <= start:
            return None
        index = start // chain.block_size
        tokens = chain.encoded_slice(start, stop)
        near = list(self.children.neighbours(chain.parent(index), tokens))
        if (public := chain.unsalted_parent(index)) != chain.parent(index):
            # The first private block: what follows the public part is another's, unless it is public as well.
            near += [each for each in self.children.neighbours(public, tokens) if each.owner == PUBLIC_OWNER]
        best, most = None, 0
        for child in near:
            common = min(child.num_tokens, chain.common_tokens(start, stop, child.tokens))
            if common > most:
                best, most = child, common
        return (best, most) if best is not None else None

    def longest_checkpoint(self, chain: Chain, start: int, stop: int) -> tuple[Block, int] | None:
        """The longest cached partial block all of whose tokens are the first of ``[start, stop)``; and how many."""
        index = start // chain.block_size
        if self.children is None or chain.unsalted_parent(index) not in self._partial:
            return None
        found = self._longest_prefix(chain.parent(index), chain, start, stop)
        if (public := chain.unsalted_parent(index)) != chain.parent(index):  # as in `longest_child`
            shared = self._longest_prefix(public, chain, start, stop, owner=PUBLIC_OWNER)
            if shared is not None and (found is None or shared.num_tokens > found.num_tokens):
                found = shared
        return None if found is None else (found, found.num_tokens)

    def _longest_prefix(
        self, parent: BlockHash, chain: Chain, start: int, stop: int, owner: str | None = None
    ) -> Block | None:
        """As `longest_checkpoint`, of the children of ``parent`` alone. owner: whose they must be; None: anyone's.

        What lies between a beginning of the tokens and the tokens themselves, in order, begins with that as well. So
        the partial child just before the tokens is the longest, or the longest has no more than that has in common.
        """
        while stop > start:
            near = self._partial_children.last_up_to(parent, chain.encoded_slice(start, stop))
            if near is None:
                return None
            common = min(near.num_tokens, chain.common_tokens(start, stop, near.tokens))
            whole = common == near.num_tokens
            if whole and (owner is None or near.owner == owner):
                return near
            stop = min(stop - 1, start + common - whole)
        return None

    def known_partial(self, chain: Chain, position: int, count: int) -> Block | None:
        """The exact cached block from which a sequence can go on behind the first ``count`` tokens of block
        ``position`` of ``chain``. Needs `index_children`.
        """
        start = position * chain.block_size
        find = self.longest_checkpoint if self.copied_whole else self.longest_child
        known = find(chain, start, start + count)
        return known[0] if known is not None and known[1] == count and known[0].exact else None

    def saved_by(self, chain: Chain, position: int, count: int) -> int:
        """How many of the first ``count`` tokens of block ``position`` of ``chain`` only the checkpoint behind them
        saves: those behind the longest shorter one. Needs `index_children`.
        """
        first = position * chain.block_size
        shorter = self.longest_checkpoint(chain, first, first + count - 1)
        return count if shorter is None else count - shorter[1]

    def has_children(self, block_hash: BlockHash) -> bool:
        """Whether a cached block, full or partial, follows a block or a root. False without `index_children`."""
        return self.children is not None and self.children.has(block_hash)

    def partial_prefix(self, chain: Chain, start: int, stop: int, *, public: bool = False) -> Block | None:
        """A cached partial block all of whose tokens are the first of ``[start, stop)``; the longest. public: see
        `enter_partial`.

        Unless blocks are copied whole there is at most one, just before these tokens in order: no cached partial block
        is the beginning of another exact one.
        """
        index = start // chain.block_size
        if self.children is None or chain.unsalted_parent(index) not in self._partial:
            return None
        if self.copied_whole:
            return self._longest_prefix(_parent(chain, index, public=public), chain, start, stop)
        for child in self.children.neighbours(chain.parent(index), chain.encoded_slice(start, stop)):
            if child.partial and chain.common_tokens(start, stop, child.tokens) >= child.num_tokens:
                return child
        return None

    def enter(self, blocks: Sequence[Block], chain: Chain, start: int, *, exact: bool, in_place: bool = False) -> None:
        """Make held blocks visible as those of ``chain`` from block ``start`` on.

        in_place: of others that were visible under the same block hashes just now.
        """
        index, size = self.index, chain.block_size
        block_hashes = chain.block_hashes[start : start + len(blocks)]
        position = start
        for block, block_hash in zip(blocks, block_hashes, strict=True):
            block.block_hash = block_hash
            block.parent = chain.parent(position)
            block.tokens = chain.block_tokens(position)
            block.num_tokens = size
            block.position = position
            block.owner = chain.owner(position)
            block.exact = exact
            index[block_hash] = block
            position += 1
        self._speculative.forget_evicted(block_hashes)
        if self.children is not None:
            for block in blocks:
                self.children.add(block)
        self.policy.admit_many(block_hashes, map(self._cost, blocks))
        self._stats.committed_blocks += len(blocks)
        if not in_place and self._events.capacity:
            for block, block_hash in zip(blocks, block_hashes, strict=True):
                self._events.append(BlockStored((block_hash,), block.parent, (block.tokens,), size))

    def enter_partial(
        self, block: Block, chain: Chain, position: int, count: int, *, keep: bool, public: bool = False
    ) -> None:
        """Make a held block visible of which only the first ``count`` tokens are computed.

        It makes no event, neither now nor when it is evicted: subscribers track full blocks only. keep: see
        `Block.keep_when_extended`. public: it is a public prefix's, though ``chain`` may be private from there on.
        """
        start = position * chain.block_size
        block.tokens = chain.encoded_slice(start, start + count)
        block.num_tokens = count
        block.partial, block.keep_when_extended = True, keep
        block.parent = _parent(chain, position, public=public)
        block.previous = chain.unsalted_parent(position)
        block.position = position
        block.owner = PUBLIC_OWNER if public else chain.owner(position)
        block.exact = True
        block.block_hash = block_hash = partial_hash(block.parent, block.tokens)
        self.index[block_hash] = block
        if self.children is not None:
            self.children.add(block)
        self.policy.admit(block_hash, self._cost(block))
        self._partial.setdefault(block.previous, set()).add(block_hash)
        self._partial_children.add(block)
        self._parents[partial_siblings_hash(block.parent)] = block.parent
        self._num_partial += 1

    def _cost(self, block: Block) -> EntryCost:
        block_cost = self.block_cost(block.position)
        return EntryCost(block_cost.size, block_cost.cost, block.owner) if block.owner else block_cost

    def unindex(self, block: Block) -> None:
        """A block is not found any more, without having been evicted."""
        assert block.block_hash is not None
        del self.index[block.block_hash]
        if block.ref_count:
            self.policy.forget(block.block_hash)
        else:
            self.policy.discard(block.block_hash)
        self._wipe([block])

    def evict(self, count: int, owner: str) -> list[Block]:
        """The blocks that make room for ``count`` of ``owner``; the policy must have as many for it."""
        return self._evicted(self.policy.evict_many_for(owner, count))

    def evict_surplus(self) -> list[Block]:
        """The blocks that a quota forbids to keep."""
        surplus = self.policy.evict_surplus()
        return self._evicted(surplus) if surplus else []

    def _evicted(self, block_hashes: Sequence[BlockHash]) -> list[Block]:
        blocks = [self.index.pop(block_hash) for block_hash in block_hashes]
        self._speculative.evicted(blocks)
        if self._num_partial:
            pairs = zip(block_hashes, blocks, strict=True)
            block_hashes = [block_hash for block_hash, block in pairs if not block.partial]
        self._wipe(blocks)
        self._stats.evicted_blocks += len(block_hashes)
        if block_hashes and self._events.capacity:
            self._events.append(BlockRemoved(tuple(block_hashes)))
        return blocks

    def record_committed(self, block: Block) -> None:
        """Keep for `take_committed`; there is a journal."""
        if block.block_hash is not None:
            self._journal[block.block_hash] = block

    def take_committed(self) -> list[Block]:
        """See `BlockPool.take_committed`."""
        if not self._journal:
            return []
        committed, self._journal = self._journal, {}
        return [block for block_hash, block in committed.items() if self.index.get(block_hash) is block]

    def among(self, block_hashes: Iterable[BlockHash]) -> list[Block]:
        """The blocks that are found under any of these, each once, the partial ones behind these, and those that follow
        the same parent: they may begin with the same tokens. A `partial_siblings_hash` stands for all of its parent.
        """
        wanted = dict.fromkeys(key for each in block_hashes for key in (each, *self._partial.get(each, ())))
        found = [self.index[block_hash] for block_hash in wanted if block_hash in self.index]
        if not self._num_partial:
            return found
        parents = {block.parent for block in found if not block.partial}
        parents.update(self._parents[each] for each in wanted if each in self._parents)
        found += [each for parent in parents for each in self._partial_children.of(parent)]
        return list({block.block_id: block for block in found}.values())

    def siblings_among(self, block_hashes: Iterable[BlockHash]) -> list[BlockHash]:
        """What stands for the partial blocks beside those of these full blocks that are found."""
        if not self.copied_whole:
            return []
        found = (self.index.get(block_hash) for block_hash in block_hashes)
        parents = dict.fromkeys(block.parent for block in found if block is not None and not block.partial)
        return [partial_siblings_hash(parent) for parent in parents]

    def snapshot(self) -> Snapshot:
        parents = {block_hash: block.parent for block_hash, block in self.index.items() if not block.partial}
        return Snapshot(self._events.last_sequence, parents)

    def _wipe(self, blocks: Iterable[Block]) -> None:
        """Blocks are in the index no more."""
        children, has_partial = self.children, self._num_partial > 0
        for block in blocks:
            if children is not None:
                children.discard(block)
            if has_partial and block.partial:
                self._wipe_partial(block)
            block.block_hash = None
            block.parent = b""
            block.tokens = b""
            block.num_tokens = 0
            block.exact = False

    def _wipe_partial(self, block: Block) -> None:
        assert block.block_hash is not None
        partial = self._partial[block.previous]
        partial.discard(block.block_hash)
        self._partial_children.discard(block)
        if not self._partial_children.has(block.parent):
            del self._parents[partial_siblings_hash(block.parent)]
        self._num_partial -= 1
        if not partial:
            del self._partial[block.previous]
        self._speculative.discard(block)
        block.partial = block.keep_when_extended = block.retained = False
        block.previous = b""


def _parent(chain: Chain, position: int, *, public: bool) -> BlockHash:
    """Of a partial block. public: see `CachedBlocks.enter_partial`."""
    return chain.unsalted_parent(position) if public else chain.parent(position)
