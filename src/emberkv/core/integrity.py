"""The conservation law of a block pool, in code: what must hold between any two calls."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from emberkv.core.block import Block, BlockState
from emberkv.core.cached_blocks import ChildIndex
from emberkv.core.hashing import BlockHash


def broken_laws(
    blocks: Sequence[Block],
    blank: Sequence[Block],
    index: Mapping[BlockHash, Block],
    evictable: int,
    holders: Iterable[Iterable[Block]] | None,
    children: ChildIndex | None = None,
) -> list[str]:
    """What does not hold; empty when the books balance.

    blank: free blocks that hold nothing. index: the blocks found under a block hash. evictable: how many the policy
    could evict. holders: the blocks of every live lease and load; with it, each ref count must be explained by them.
    children: the same blocks by their parents, where the pool keeps them so.
    """
    laws = [*_of_the_pool(blocks, blank, index, evictable), *_of_each_block(blocks)]
    if holders is not None:
        held = Counter(block.block_id for each in holders for block in each)
        laws += [
            (
                block.ref_count == held[block.block_id],
                f"slot {block.block_id}: {block.ref_count} refs, {held[block.block_id]} held",
            )
            for block in blocks
        ]
    if children is not None:
        known = len(children) == len(index) and all(block in children for block in index.values())
        laws.append((known, "the children of blocks and the index differ"))
    return [what for holds, what in laws if not holds]


def _of_the_pool(
    blocks: Sequence[Block], blank: Sequence[Block], index: Mapping[BlockHash, Block], evictable: int
) -> list[tuple[bool, str]]:
    free = sum(block.state is BlockState.FREE for block in blocks)
    cached = sum(block.block_hash is not None for block in blocks)
    free_cached = sum(block.state is BlockState.FREE and block.block_hash is not None for block in blocks)
    return [
        (free == len(blank) + evictable, "free blocks and the free lists differ"),
        (free_cached == evictable, "evictable blocks and the policy differ"),
        (all(block.ref_count == 0 and block.block_hash is None for block in blank), "a blank block is in use"),
        (len({block.block_id for block in blank}) == len(blank), "a slot is blank twice"),
        (all(block.block_hash == key for key, block in index.items()), "the index names a wrong block"),
        (cached == len(index), "a cached block is not indexed"),
    ]


def _of_each_block(blocks: Sequence[Block]) -> list[tuple[bool, str]]:
    laws = []
    for block in blocks:
        indexed = block.block_hash is not None
        private = block.state in (BlockState.ALLOCATED, BlockState.PENDING)
        laws += [
            ((block.state is BlockState.FREE) == (block.ref_count == 0), f"slot {block.block_id}: holders"),
            (block.state is not BlockState.COMMITTED or indexed, f"slot {block.block_id}: not indexed"),
            (not private or not indexed, f"slot {block.block_id}: indexed"),
            (
                block.state is not BlockState.PENDING or block.ref_count == 1,
                f"slot {block.block_id}: pending for several",
            ),
        ]
    return laws
