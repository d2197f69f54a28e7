"""Which checkpoints a pool keeps beside what it would cache anyway, and where a prompt is to leave them.

A checkpoint takes a whole block, however few tokens it holds. Where a prompt leaves what is cached, others were seen to
part, and a checkpoint is worth its block. At a prompt's end, and where its caller expects others to part from it, that
is a guess: such a checkpoint is on `Probation`.
"""

from collections.abc import Iterable, Mapping, Sequence

from emberkv.core.block import Block
from emberkv.core.hashing import BlockHash

BRANCH_TOKENS = 64
"""Fewer tokens are not worth a checkpoint, which takes a block of the pool and costs one more prefill chunk."""

PROVEN_USES = 2
"""As many sequences go on from a checkpoint before it stays as long as any other block."""

FIRST_SHARE, LARGEST_SHARE = 32, 4
"""On probation is at most one part in so many of the pool's blocks, at first, and where that has proved worth it."""


def places(wanted: Iterable[int], start: int, stop: int, *, block_size: int, least: int) -> list[int]:
    """Of the numbers of tokens ``wanted``, those behind which a checkpoint is worth its block, ascending.

    Each lies before token ``stop`` and saves ``least`` tokens: from ``start``, where the hit ends, the checkpoint
    before it, or the full block before it, which a sequence can go on from as well.

    >>> places([100, 150, 1100], 20, 2000, block_size=1024, least=64)
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


class Probation:
    """The cached checkpoints on probation, the oldest or least lately used first, and how many a full pool may have.

    Without them the pool would still have the blocks that were evicted last, as many as there are on probation. A
    prompt that misses one of those lowers the limit by the block; a sequence that goes on from a checkpoint on
    probation raises it by what that holds, in blocks. So where more blocks are asked for again than fit, few stay.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.limit = max(1.0, num_blocks / FIRST_SHARE)
        self._most = max(1.0, num_blocks / LARGEST_SHARE)
        self._block_size = block_size
        self._blocks: dict[BlockHash, Block] = {}
        self._evicted: dict[BlockHash, None] = {}  # at most as many as ``_blocks``, the last one last

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def is_full(self) -> bool:
        return len(self._blocks) + 1 > self.limit

    @property
    def is_too_large(self) -> bool:
        return len(self._blocks) > self.limit

    def add(self, block: Block) -> None:
        """A cached block is a checkpoint on probation from now on."""
        assert block.block_hash is not None
        block.uses = 0
        self._blocks[block.block_hash] = block

    def used(self, block: Block) -> None:
        """A sequence goes on from a cached block, whatever that is."""
        if block.block_hash is None or block.block_hash not in self._blocks:
            return
        del self._blocks[block.block_hash]
        self.limit = min(self._most, self.limit + block.num_tokens / self._block_size)
        block.uses += 1
        if block.uses < PROVEN_USES:
            self._blocks[block.block_hash] = block

    def discard(self, block: Block) -> None:
        """A block is not found any more."""
        if block.block_hash is not None:
            self._blocks.pop(block.block_hash, None)

    def evicted(self, block_hashes: Sequence[BlockHash]) -> None:
        """Full blocks had to make room."""
        for block_hash in block_hashes if self._blocks else ():
            self._evicted[block_hash] = None
        while len(self._evicted) > len(self._blocks):
            del self._evicted[next(iter(self._evicted))]

    def missing(self, block_hashes: Sequence[BlockHash], position: int) -> None:
        """Of a prompt's blocks those from ``position`` on are not cached."""
        while self._evicted and position < len(block_hashes) and block_hashes[position] in self._evicted:
            del self._evicted[block_hashes[position]]
            self.limit = max(1.0, self.limit - 1)
            position += 1

    def is_part_of(self, index: Mapping[BlockHash, Block]) -> bool:
        """Whether all are found under their hashes."""
        return all(index.get(block_hash) is block for block_hash, block in self._blocks.items())

    def oldest(self, owner: str) -> Block | None:
        """Of an owner's, the one to make room; None where each is held, or retained."""
        blocks = self._blocks.values()
        return next((each for each in blocks if each.owner == owner and not each.ref_count and not each.retained), None)
