"""Where a prompt leaves checkpoints, and how many of them stay beside what a pool would cache anyway.

A checkpoint takes a whole block, however few tokens it holds. Where a prompt leaves what is cached, others were seen to
part, and a checkpoint is worth its block. Every other one is *speculative*: it stays for good only once it was used.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from emberkv.core.block import Block
from emberkv.core.hashing import BlockHash
from emberkv.core.stats import SchedulerStats

BRANCH_TOKENS = 64
"""Fewer tokens are not worth a checkpoint, which takes a block of the pool and costs one more prefill chunk."""

PROVEN_USES = 2
"""As many sequences go on from a speculative checkpoint before it stays as long as any other block."""

FIRST_SHARE, LARGEST_SHARE = 32, 4
"""Speculative are at most one part in so many of the pool's blocks, at first, and of its owner's blocks at any time."""

GIVEN_UP_AFTER = 32
"""After as many speculative checkpoints of one kind without a use, that kind is tried once in a while only."""

TRIED_ONE_IN = 32
"""Of the checkpoints that do not seem to be worth it, so many are refused for each one that is left."""


class CheckpointKind(Enum):
    """Why a checkpoint is left within a prompt, or stays behind an answer."""

    BRANCH = "branch"  # the prompt leaves what is cached: not speculative
    PROMPT_END = "prompt_end"  # the same prompt may come again
    HINT = "hint"  # the caller expects other prompts to part there
    ANSWER_END = "answer_end"  # the next turn went on from there; that may be written anew


def checkpoint_positions(wanted: Iterable[int], start: int, stop: int, *, block_size: int, least: int) -> list[int]:
    """Of the numbers of tokens ``wanted``, those behind which a checkpoint is worth its block, ascending.

    Each lies before token ``stop`` and saves ``least`` tokens: from ``start``, where the hit ends, the checkpoint
    before it, or the full block before it, which a sequence can go on from as well.

    >>> checkpoint_positions([100, 150, 1100], 20, 2000, block_size=1024, least=64)
    [100, 1100]
    """
    found: list[int] = []
    before = start
    for at in sorted(wanted):
        before = max(before, at - at % block_size)
        if at < stop and at - before >= least:
            found.append(at)
            before = at
    return found


@dataclass(slots=True)
class _Entry:
    """uses: how many sequences have gone on from it."""

    block: Block
    kind: CheckpointKind
    uses: int = 0


class OwnerCheckpoints:
    """The speculative checkpoints of one owner, the oldest or least lately used first, and how many a full pool may
    have of them.

    The limit is adapted as ARC adapts the sizes of its two lists, by a list of evicted entries (Megiddo and Modha,
    FAST 2003). Without the speculative checkpoints the owner would still have those of its blocks that were evicted
    last, as many as there are such checkpoints. A prompt that misses one of these lowers the limit by one block. A
    sequence that goes on from a speculative checkpoint raises it by the tokens that this saves, in blocks. So an owner
    that asks for more blocks again than fit has few, or none.

    num_owned: counts the owner's cached blocks, of which at most one in `LARGEST_SHARE` is speculative.
    """

    def __init__(self, first_limit: float, block_size: int, num_owned: Callable[[], float]) -> None:
        self.entries: dict[BlockHash, _Entry] = {}
        self.evicted: dict[BlockHash, None] = {}  # at most as many as ``entries``, the last one last
        self._adapted = first_limit
        self._block_size = block_size
        self._num_owned = num_owned
        self._unused: Counter[CheckpointKind] = Counter()  # left since the last use of their kind
        self._refused: Counter[CheckpointKind] = Counter()

    @property
    def limit(self) -> float:
        return min(self._adapted, self._most)

    @property
    def _most(self) -> float:
        return self._num_owned() / LARGEST_SHARE

    @property
    def is_full(self) -> bool:
        return len(self.entries) + 1 > self.limit

    @property
    def is_too_large(self) -> bool:
        return len(self.entries) > self.limit

    def decide_on(self, kind: CheckpointKind, *, has_blank: bool) -> bool:
        """Decide whether one more is to be left, which costs a step and the copy of a block. Refusals are counted.

        Not if the limit allows none, nor while none of its kind is used; but then one in `TRIED_ONE_IN` is left, so
        that both can change. has_blank: whether the owner can have a block that holds nothing.
        """
        if (has_blank or self.limit >= 1) and self._unused[kind] < GIVEN_UP_AFTER:
            return True
        self._refused[kind] += 1
        if self._refused[kind] % TRIED_ONE_IN:
            return False
        self._adapted = max(self._adapted, 1.0)
        return True

    def add(self, block: Block, kind: CheckpointKind) -> None:
        """A cached block is a speculative checkpoint from now on."""
        assert block.block_hash is not None
        self.entries[block.block_hash] = _Entry(block, kind)
        self._unused[kind] += 1

    def used(self, entry: _Entry, tokens: int) -> None:
        """A sequence has gone on from one, which saves ``tokens``."""
        block_hash = entry.block.block_hash
        assert block_hash is not None
        self._unused[entry.kind] = 0
        self._adapted = max(self._adapted, min(self._adapted + tokens / self._block_size, self._most))
        entry.uses += 1
        del self.entries[block_hash]
        if entry.uses < PROVEN_USES:
            self.entries[block_hash] = entry

    def missed(self, block_hash: BlockHash) -> None:
        """A prompt misses one of ``evicted``."""
        del self.evicted[block_hash]
        self._adapted = max(0.0, self.limit - 1)

    def oldest(self) -> Block | None:
        """The one to be dropped first; None where each is held."""
        return next((entry.block for entry in self.entries.values() if not entry.block.ref_count), None)


class SpeculativeCheckpoints:
    """The speculative checkpoints of a pool, by owner.

    num_owned: how many cached blocks an owner has. has_blank_for: whether it can have a block that holds nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        stats: SchedulerStats,
        *,
        num_owned: Callable[[str], float],
        has_blank_for: Callable[[str], bool],
    ) -> None:
        self._first_limit = max(1.0, num_blocks / FIRST_SHARE)
        self._block_size = block_size
        self._stats = stats
        self._num_owned = num_owned
        self._has_blank_for = has_blank_for
        self._owners: dict[str, OwnerCheckpoints] = {}
        self._evicted: dict[BlockHash, OwnerCheckpoints] = {}  # whose ``evicted`` each is among

    def __len__(self) -> int:
        return sum(len(each.entries) for each in self._owners.values())

    def of(self, owner: str) -> OwnerCheckpoints:
        """An owner's, with none at first."""
        found = self._owners.get(owner)
        if found is None:
            found = OwnerCheckpoints(self._first_limit, self._block_size, lambda: self._num_owned(owner))
            self._owners[owner] = found
        return found

    def known(self, owner: str) -> OwnerCheckpoints | None:
        """An owner's; None where it never had any."""
        return self._owners.get(owner)

    def allows(self, owner: str) -> bool:
        """Whether ``owner`` may have one more: a blank block is there for it, or its limit allows it."""
        return self._has_blank_for(owner) or not self.of(owner).is_full

    def is_worth(self, owner: str, kind: CheckpointKind) -> bool:
        """Whether a prompt of ``owner`` is to leave a checkpoint of that kind, at the price of a step and a copy."""
        if kind is CheckpointKind.BRANCH:
            return True
        checkpoints = self.of(owner)
        worth = checkpoints.decide_on(kind, has_blank=self._has_blank_for(owner))
        return worth and (self.allows(owner) or checkpoints.oldest() is not None)

    def add(self, block: Block, kind: CheckpointKind) -> None:
        """A cached block is a speculative checkpoint of its owner from now on."""
        self.of(block.owner).add(block, kind)
        self._stats.speculative_checkpoints += 1

    def is_unused(self, block: Block) -> bool:
        """Whether a cached block is a speculative checkpoint from which no sequence has gone on."""
        entry = self._entry(block)
        return entry is not None and not entry.uses

    def used(self, block: Block, tokens: int) -> bool:
        """A sequence has gone on from a cached block, whatever that is, which saves ``tokens``: those that it holds
        behind the next best place to go on from. Whether that is a speculative checkpoint's first use.
        """
        entry = self._entry(block)
        if entry is None:
            return False
        is_first = not entry.uses
        self._stats.speculative_used += is_first
        self.of(block.owner).used(entry, tokens)
        return is_first

    def confirm(self, block: Block) -> bool:
        """A cached block, whatever that is, is wanted for another reason: it is not speculative any more. Whether it
        was, and had no use.
        """
        entry = self._entry(block)
        if entry is None:
            return False
        self._stats.speculative_used += not entry.uses
        self._remove(block)
        return not entry.uses

    def discard(self, block: Block) -> None:
        """A block, whatever that is, is found no more."""
        entry = self._entry(block)
        if entry is not None:
            self._stats.speculative_unused += not entry.uses
            self._remove(block)

    def _entry(self, block: Block) -> _Entry | None:
        owner = self._owners.get(block.owner)
        return None if owner is None or block.block_hash is None else owner.entries.get(block.block_hash)

    def _remove(self, block: Block) -> None:
        assert block.block_hash is not None
        owner = self._owners[block.owner]
        del owner.entries[block.block_hash]
        self._forget_oldest_evicted(owner)

    def evicted(self, blocks: Iterable[Block]) -> None:
        """Cached blocks are evicted, for other blocks or by their owner's quota."""
        if not self._owners:
            return
        for block in blocks:
            owner = self._owners.get(block.owner)
            if owner is not None and owner.entries and not block.partial and block.block_hash is not None:
                owner.evicted.pop(block.block_hash, None)  # one that is evicted again is the last one
                owner.evicted[block.block_hash] = None
                self._evicted[block.block_hash] = owner
                self._forget_oldest_evicted(owner)

    def _forget_oldest_evicted(self, owner: OwnerCheckpoints) -> None:
        while len(owner.evicted) > len(owner.entries):
            oldest = next(iter(owner.evicted))
            del owner.evicted[oldest], self._evicted[oldest]

    def missing(self, block_hashes: Sequence[BlockHash], position: int) -> None:
        """Of a prompt's blocks those from ``position`` on are not cached, and are computed."""
        while position < len(block_hashes):
            owner = self._evicted.pop(block_hashes[position], None)
            if owner is None:
                break
            owner.missed(block_hashes[position])
            position += 1

    def forget_evicted(self, block_hashes: Iterable[BlockHash]) -> None:
        """Blocks are cached again, or were removed on purpose since they were evicted."""
        for block_hash in block_hashes if self._evicted else ():
            owner = self._evicted.pop(block_hash, None)
            if owner is not None:
                del owner.evicted[block_hash]

    def forget_all_evicted(self) -> None:
        """All blocks were removed on purpose."""
        for owner in self._owners.values():
            owner.evicted.clear()
        self._evicted.clear()

    def is_part_of(self, index: Mapping[BlockHash, Block]) -> bool:
        """Whether all are found under their hashes, and nothing that is found counts as evicted."""
        entries = [(block_hash, entry) for each in self._owners.values() for block_hash, entry in each.entries.items()]
        return all(index.get(block_hash) is entry.block for block_hash, entry in entries) and not any(
            block_hash in index for block_hash in self._evicted
        )
