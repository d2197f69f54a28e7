"""What the pool does for the tiers below it, and for the processes that share it."""

import pytest

from emberkv.core.block import BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import BlockRemoved
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, TokenChain
from emberkv.core.policies.eviction import LRU, EntryCost
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.errors import NoFreeBlocksError
from tests.core.harness import chain, root, store

ABC = chain(range(12))  # three blocks of four


def owned(tokens: range, owner: str, public_blocks: int = 0) -> TokenChain:
    return TokenChain(root(4), tokens, 4, owner=owner, salt=owner.encode(), public_blocks=public_blocks)


def shared_pool(num_blocks: int, **shares: Share) -> BlockPool:
    policy: FairShares[BlockHash] = FairShares(LRU, shares, Share())
    return BlockPool(num_blocks, 4, policy=policy, block_cost=lambda position: EntryCost(size=100.0))


def test_expected_blocks_are_pending_until_fulfilled() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.reserve_for_load(3)
    assert [(block.state, block.ref_count) for block in blocks] == [(BlockState.PENDING, 1)] * 3
    assert pool.num_free == 1
    pool.check_integrity([blocks])
    assert pool.complete_load(blocks, ABC, 0, [True, False]) == 2
    assert (pool.num_free, pool.num_cached, pool.num_evictable) == (4, 2, 2)
    assert [block.exact for block in pool.match(ABC, stop=3).blocks] == [True, False]
    pool.check_integrity([])


def test_more_than_is_free_cannot_be_expected() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(NoFreeBlocksError, match="3 blocks asked for, 2 of 2 are free"):
        pool.reserve_for_load(3)
    assert pool.num_free == 2


def test_a_revoked_block_ends_the_run() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.reserve_for_load(3)
    pool.cancel_load([blocks[1]])
    assert pool.complete_load(blocks, ABC, 0, [True] * 3) == 1
    assert (pool.num_free, pool.num_cached) == (4, 1)


def test_a_collision_ends_the_run() -> None:
    pool = BlockPool(8, 4)
    forged = chain([*range(4), 9, 9, 9, 9, *range(8, 12)])
    forged.block_hashes = list(ABC.block_hashes)
    held = store(pool, forged)
    blocks = pool.reserve_for_load(3)
    assert pool.complete_load(blocks, ABC, 0, [True] * 3) == 1
    assert pool.stats.collisions == 1
    pool.check_integrity([held])


def test_the_journal_names_what_became_visible_and_still_is() -> None:
    pool = BlockPool(8, 4, journal=True)
    held = store(pool, ABC)
    assert pool.take_committed() == held
    assert pool.take_committed() == []
    again = store(pool, ABC)
    assert (pool.take_committed(), pool.stats.duplicate_blocks) == ([], 3)
    pool.free(held)
    pool.free(again)
    other = store(pool, chain(range(50, 58)))
    pool.remove([chain(range(50, 58)).block_hashes[0]])
    assert pool.take_committed() == other[1:]
    pool.complete_load(pool.reserve_for_load(1), chain([7] * 4), 0, [True])
    assert pool.take_committed() == []


def test_an_exact_copy_is_news() -> None:
    pool = BlockPool(8, 4, journal=True)
    pool.free(store(pool, ABC, exact=False))
    pool.take_committed()
    exact = store(pool, ABC)
    assert pool.take_committed() == exact


def test_without_a_journal_nothing_is_kept() -> None:
    pool = BlockPool(8, 4)
    store(pool, ABC)
    assert pool.take_committed() == []


def test_removed_blocks_are_forgotten_but_stay_with_their_holders() -> None:
    pool = BlockPool(8, 4)
    held = store(pool, ABC)
    assert pool.remove([ABC.block_hashes[1], ABC.block_hashes[1], b"unknown"]) == 1
    assert [pool.lookup(block_hash) is not None for block_hash in ABC.block_hashes] == [True, False, True]
    assert (held[1].state, pool.num_cached) == (BlockState.ALLOCATED, 2)
    events = pool.events.since(pool.events.last_sequence - 1)
    assert events is not None
    assert events[0] == BlockRemoved((ABC.block_hashes[1],), evicted=False)
    pool.check_integrity([held])
    pool.free(held)
    assert pool.remove(ABC.block_hashes) == 2
    assert (pool.num_free, pool.num_evictable) == (8, 0)


def test_blocks_are_on_their_owners_books() -> None:
    pool = shared_pool(8, me=Share(quota_bytes=200))
    mine = owned(range(20), "me", public_blocks=1)
    pool.free(store(pool, mine))
    found = [pool.lookup(block_hash) is not None for block_hash in mine.block_hashes]
    assert found == [True, True, True, False, False], "one public block, two within the quota"
    assert mine.owner(0) == PUBLIC_OWNER
    assert (pool.num_free, pool.stats.evicted_blocks) == (8, 2)
    pool.check_integrity([])


def test_a_flood_leaves_others_their_floor() -> None:
    pool = shared_pool(6, small=Share(floor_bytes=200))
    small = owned(range(8), "small")
    pool.free(store(pool, small))
    for first in range(100, 200, 8):
        flood = owned(range(first, first + 8), "flood")
        blocks = pool.allocate(2, "flood")
        pool.free([pool.commit(block, flood, position, exact=True) for position, block in enumerate(blocks)])
    assert [pool.lookup(block_hash) is not None for block_hash in small.block_hashes] == [True, True]
    pool.check_integrity([])
