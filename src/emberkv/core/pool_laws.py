"""The laws that blocks, the index and the eviction policy of a pool keep, for `BlockPool`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from emberkv.core.block import Block, BlockState
from emberkv.core.cached_blocks import ChildIndex
from emberkv.core.hashing import BlockHash
from emberkv.errors import IntegrityError

_FREE = BlockState.FREE


def require_allocated(block: Block) -> None:
    """Raise IntegrityError for a block that must not be committed."""
    if block.state is not BlockState.ALLOCATED:
        raise IntegrityError(f"block {block.block_id} is {block.state.value}; only an allocated block can be committed")


def broken_laws(
    blocks: Sequence[Block],
    blank: Sequence[Block],
    index: Mapping[BlockHash, Block],
    evictable: int,
    holders: Iterable[Iterable[Block]] | None,
    children: ChildIndex | None = None,
) -> list[str]:
    """The laws that do not hold; empty when all do.

    blank: free blocks that hold nothing. index: the blocks found under a block hash. evictable: how many the policy
    could evict. holders: the blocks of every live lease and load; with it, each ref count must be explained by them.
    children: the same blocks by their parents, where the pool keeps them so.
    """
    broken = [*_of_the_pool(blocks, blank, index, evictable), *_of_each_block(blocks)]
    if holders is not None:
        held = Counter(block.block_id for each in holders for block in each)
        broken += [
            f"block {block.block_id}: {block.ref_count} refs, {held[block.block_id]} held"
            for block in blocks
            if block.ref_count != held.get(block.block_id, 0)
        ]
    if children is not None and (len(children) != len(index) or any(each not in children for each in index.values())):
        broken.append("the children of blocks and the index differ")
    return broken


def _of_the_pool(
    blocks: Sequence[Block], blank: Sequence[Block], index: Mapping[BlockHash, Block], evictable: int
) -> list[str]:
    free = [block for block in blocks if block.state is _FREE]
    free_cached = sum([block.block_hash is not None for block in free])
    cached = sum([block.block_hash is not None for block in blocks])
    laws = [
        (len(free) == len(blank) + evictable, "free blocks and the free lists differ"),
        (free_cached == evictable, "evictable blocks and the policy differ"),
        (not any(block.ref_count or block.block_hash is not None for block in blank), "a blank block is in use"),
        (len({block.block_id for block in blank}) == len(blank), "a block is blank twice"),
        ([block.block_hash for block in index.values()] == list(index), "the index names a wrong block"),
        (cached == len(index), "a cached block is not indexed"),
    ]
    return [what for holds, what in laws if not holds]


def _of_each_block(blocks: Sequence[Block]) -> list[str]:
    broken = [
        f"block {block.block_id}: holders" for block in blocks if (block.state is _FREE) is (block.ref_count != 0)
    ]
    for block in blocks:
        if block.state is _FREE:
            continue
        indexed = block.block_hash is not None
        if block.state is BlockState.COMMITTED:
            if not indexed:
                broken.append(f"block {block.block_id}: not indexed")
        elif indexed:
            broken.append(f"block {block.block_id}: indexed")
        if block.state is BlockState.PENDING and block.ref_count != 1:
            broken.append(f"block {block.block_id}: pending for several")
    return broken
