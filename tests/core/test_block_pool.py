"""The pool: a block's life, what a match may return, and the conservation law."""

import pytest

from emberkv.core.block import BlockState, MatchEnd
from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain
from emberkv.core.policies.eviction import S3FIFO
from emberkv.errors import ConfigError, IntegrityError, NoFreeBlocksError
from tests.core.harness import chain, store

ABC = chain(range(12))  # three blocks of four


def forged(tokens: list[int], hashes_of: TokenChain) -> TokenChain:
    """Another chain under the same block hashes, as if SHA-256 had collided."""
    forgery = chain(tokens)
    forgery.block_hashes = list(hashes_of.block_hashes)
    return forgery


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"a pool of {num_blocks} blocks of {block_size} tokens"):
        BlockPool(num_blocks, block_size)


def test_a_blocks_life() -> None:
    pool = BlockPool(4, 4)
    [block, spare] = pool.allocate(2)
    assert (block.state, block.ref_count, pool.num_free) == (BlockState.ALLOCATED, 1, 2)
    assert pool.commit(block, ABC, 0, exact=True) is block
    assert (block.state, pool.num_cached) == (BlockState.COMMITTED, 1)
    pool.free([block, spare])
    assert (block.state, block.ref_count) == (BlockState.FREE, 0)
    assert (pool.num_free, pool.num_evictable, pool.num_cached) == (4, 1, 1)
    pool.pin([block])
    assert (block.state, block.ref_count, pool.num_free) == (BlockState.COMMITTED, 1, 3)
    pool.free([block])
    pool.allocate(4)
    assert (pool.num_free, pool.num_cached, pool.lookup(ABC.block_hashes[0])) == (0, 0, None)
    assert pool.stats.evicted_blocks == 1
    pool.check_integrity([pool.blocks])


def test_new_blocks_are_committed_together_up_to_one_that_is_known() -> None:
    pool = BlockPool(8, 4, journal=True)
    [known] = pool.allocate(1)
    pool.commit(known, ABC, 2, exact=True)
    pool.take_committed()
    table = pool.allocate(3)
    assert pool.commit_new(table, ABC, 0, 3, exact=False) == 2
    assert [block.state for block in table] == [BlockState.COMMITTED, BlockState.COMMITTED, BlockState.ALLOCATED]
    assert [pool.lookup(block_hash) for block_hash in ABC.block_hashes] == [*table[:2], known]
    assert [(block.tokens, block.parent, block.exact) for block in table[:2]] == [
        (ABC.block_tokens(0), ABC.root, False),
        (ABC.block_tokens(1), ABC.block_hashes[0], False),
    ]
    assert pool.commit_new(table, ABC, 2, 3, exact=False) == 0
    assert pool.take_committed() == table[:2]
    assert (pool.num_cached, pool.stats.committed_blocks) == (3, 3)
    pool.check_integrity([[known], table])


def test_blank_slots_go_first_then_the_end_of_a_chain() -> None:
    pool = BlockPool(5, 4)
    pool.free(store(pool, ABC))
    cached = []
    for count in (2, 1, 1, 1):
        pool.allocate(count)
        cached.append([pool.lookup(block_hash) is not None for block_hash in ABC.block_hashes])
    assert cached == [[True, True, True], [True, True, False], [True, False, False], [False, False, False]]


def test_too_many_blocks_change_nothing() -> None:
    pool = BlockPool(4, 4)
    pool.free(store(pool, ABC))
    held = pool.allocate(1)
    with pytest.raises(NoFreeBlocksError, match="4 blocks asked for, 3 of 4 are free"):
        pool.allocate(4)
    assert (pool.num_free, pool.num_cached, pool.stats.evicted_blocks) == (3, 3, 0)
    pool.check_integrity([held])


def test_a_match_is_the_longest_consecutive_run() -> None:
    pool = BlockPool(8, 4)
    blocks = store(pool, ABC)
    other = chain([*range(8), 99, 99, 99, 99])
    assert pool.match(ABC, stop=3).blocks == blocks
    assert pool.match(ABC, stop=3).end is MatchEnd.LIMIT
    assert pool.match(ABC, start=1, stop=2).blocks == blocks[1:2]
    assert (pool.match(other, stop=3).blocks, pool.match(other, stop=3).end) == (blocks[:2], MatchEnd.ABSENT)
    assert pool.match(chain(range(1, 13)), stop=3).blocks == []
    assert pool.match(chain(range(12), salt=b"other"), stop=3).blocks == []


def test_a_match_holds_nothing_and_moves_nothing() -> None:
    pool = BlockPool(6, 4)
    first, second = chain([1] * 4), chain([2] * 4)
    pool.free(store(pool, first))
    pool.free(store(pool, second))
    assert pool.match(first, stop=1).blocks == [pool.lookup(first.block_hashes[0])]
    assert pool.num_free == 6
    pool.check_integrity([])
    pool.allocate(5)
    assert pool.lookup(first.block_hashes[0]) is None, "looking at it made the oldest block younger"
    assert pool.lookup(second.block_hashes[0]) is not None


def test_what_is_pinned_survives_an_allocation() -> None:
    pool = BlockPool(3, 4)
    pool.free(store(pool, ABC))
    found = pool.match(ABC, stop=2).blocks
    pool.pin(found)
    [fresh] = pool.allocate(1)
    assert fresh.block_id == 2
    with pytest.raises(NoFreeBlocksError):
        pool.allocate(1)
    assert pool.match(ABC, stop=2).blocks == found
    pool.check_integrity([found, [fresh]])


def test_a_collision_is_no_match() -> None:
    pool = BlockPool(8, 4)
    blocks = store(pool, ABC)
    forgery = forged([0, 1, 2, 3, 9, 9, 9, 9, 8, 9, 10, 11], ABC)
    match = pool.match(forgery, stop=3)
    assert (match.blocks, match.end) == (blocks[:1], MatchEnd.TOKENS_DIFFER)
    assert pool.stats.collisions == 1


def test_a_collision_at_commit_stays_private() -> None:
    pool = BlockPool(8, 4)
    known = store(pool, ABC)
    [ours] = pool.allocate(1)
    assert pool.commit(ours, forged([9] * 12, ABC), 0, exact=True) is ours
    assert (ours.state, ours.block_hash) == (BlockState.ALLOCATED, None)
    assert pool.lookup(ABC.block_hashes[0]) is known[0]
    assert pool.stats.collisions == 1
    pool.check_integrity([known, [ours]])
    pool.free([ours])
    assert pool.num_free == 5


@pytest.mark.parametrize(("known_exact", "ours_exact"), [(True, True), (True, False), (False, False)])
def test_a_duplicate_keeps_theirs_and_frees_ours(known_exact: bool, ours_exact: bool) -> None:
    pool = BlockPool(4, 4)
    [known] = store(pool, chain([1] * 4), exact=known_exact)
    [ours] = store(pool, chain([1] * 4), exact=ours_exact)
    assert ours is known
    assert (known.ref_count, known.exact, pool.num_free) == (2, known_exact, 3)
    assert (pool.stats.duplicate_blocks, pool.stats.committed_blocks) == (1, 1)
    pool.check_integrity([[known], [ours]])


@pytest.mark.parametrize("held", [True, False])
def test_exact_takes_the_place_of_inexact(held: bool) -> None:
    pool = BlockPool(4, 4)
    tokens = chain([1] * 4)
    [old] = store(pool, tokens, exact=False)
    if not held:
        pool.free([old])
    [new] = store(pool, tokens, exact=True)
    assert new is not old
    assert pool.lookup(tokens.block_hashes[0]) is new
    assert (old.state, old.block_hash) == (BlockState.ALLOCATED if held else BlockState.FREE, None)
    assert (pool.stats.replaced_blocks, pool.num_cached, pool.num_evictable) == (1, 1, 0)
    pool.check_integrity([[old], [new]] if held else [[new]])
    pool.free([new, old] if held else [new])
    assert (pool.num_free, pool.num_evictable) == (4, 1)
    pool.check_integrity([])


def test_clear_forgets_all_and_takes_nothing_from_holders() -> None:
    pool = BlockPool(6, 4)
    held = store(pool, ABC)
    pool.free(store(pool, chain([7] * 4)))
    pool.clear()
    assert (pool.num_cached, pool.num_evictable, pool.num_free) == (0, 0, 3)
    assert {block.state for block in held} == {BlockState.ALLOCATED}
    pool.check_integrity([held])
    again = store(pool, ABC)
    pool.free(held)
    assert pool.match(ABC, stop=3).blocks == again
    pool.check_integrity([again])


def test_a_slots_next_block_inherits_no_history() -> None:
    pool = BlockPool(20, 4, policy=S3FIFO())
    chains = [chain([number] * 4) for number in range(22)]
    for each in chains[:20]:
        pool.free(store(pool, each))
    for each in chains[:18]:
        hit = pool.match(each, stop=1).blocks
        pool.pin(hit)
        pool.free(hit)
    pool.free(store(pool, chains[20]))
    assert pool.lookup(chains[18].block_hashes[0]) is None, "never read, first in the small queue"
    pool.free(store(pool, chains[21]))
    assert pool.lookup(chains[19].block_hashes[0]) is None, "never read; the new block waits behind it"
    assert pool.lookup(chains[20].block_hashes[0]) is not None


def test_misuse_is_an_integrity_error() -> None:
    pool = BlockPool(4, 4)
    [block] = store(pool, chain([1] * 4))
    with pytest.raises(IntegrityError, match="block 0 is committed; only an allocated block"):
        pool.commit(block, chain([1] * 4), 0, exact=True)
    pool.free([block])
    with pytest.raises(IntegrityError, match="block 0 is freed but has no holder"):
        pool.free([block])
