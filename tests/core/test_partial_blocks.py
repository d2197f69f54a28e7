"""Hits that end within a block: partial blocks, full blocks whose beginning is reused, and their copies."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.block import BlockCopy, BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import BlockRemoved, BlockStored
from emberkv.core.hashing import TokenChain, common_tokens
from emberkv.core.prefix_cache import Lease, PrefixCache
from emberkv.core.sequence import FinishReason
from emberkv.errors import IntegrityError
from tests.core.harness import Harness, chain, root


def cache(num_blocks: int = 16, *, batch_invariant: bool = True) -> PrefixCache:
    return PrefixCache(BlockPool(num_blocks, 4), alignment=4, batch_invariant=batch_invariant)


def computed(cache: PrefixCache, tokens: TokenChain, count: int | None = None) -> Lease:
    """A lease of which the first ``count`` tokens are computed, or all."""
    lease = cache.acquire(tokens)
    lease.extend(len(tokens))
    lease.commit_prefilled(len(tokens) if count is None else count)
    return lease


def left(cache: PrefixCache, tokens: TokenChain, count: int | None = None) -> int:
    """Computes as much and lets go; the slot of the last block that holds any of it."""
    lease = computed(cache, tokens, count)
    block_id = lease.blocks[(len(tokens) if count is None else count) // cache.pool.block_size].block_id
    lease.release()
    cache.pool.check_integrity()
    return block_id


def hit(cache: PrefixCache, tokens: TokenChain) -> int:
    """What is found, and then leased."""
    full = len(cache.match(tokens).blocks)
    child = cache.longest_child(tokens, full)
    lease = cache.acquire(tokens)
    lease.extend(len(tokens))
    assert lease.hit_tokens == cache.pool.block_size * full + (child[1] if child is not None else 0)
    lease.release()
    cache.pool.check_integrity([])
    return lease.hit_tokens


def test_the_beginning_of_a_block_is_copied_and_the_block_stays_for_others() -> None:
    shared = cache()
    block_id = left(shared, chain(range(11)))
    lease = shared.acquire(chain(range(15)))
    lease.extend(15)
    assert (lease.hit_tokens, lease.num_committed) == (11, 2)
    assert lease.copy == BlockCopy(shared.pool.blocks[block_id], lease.blocks[2], 3)
    assert (lease.blocks[2].state, lease.blocks[2].block_id != block_id) == (BlockState.ALLOCATED, True)
    shared.pool.check_integrity([lease.pinned])
    assert shared.longest_child(chain(range(12)), 2) == (shared.pool.blocks[block_id], 3)
    lease.commit_prefilled(15)
    assert lease.copy is None
    shared.pool.check_integrity([lease.blocks])
    assert shared.match(chain(range(16))).blocks[2] is lease.blocks[2]


def test_a_full_block_that_a_partial_one_begins_takes_its_place() -> None:
    shared = cache()
    left(shared, chain(range(11)))
    assert shared.pool.num_evictable == 3
    computed(shared, chain(range(12))).release()
    assert (shared.pool.num_cached, shared.pool.num_evictable) == (3, 3)
    assert hit(shared, chain(range(12))) == 11


@pytest.mark.parametrize("answer", range(1, 12))
def test_a_repeat_hits_no_less_because_its_answer_grew(answer: int) -> None:
    harness = Harness(batch_invariant=True, num_blocks=32)
    harness.add("first", range(6), new=answer)
    harness.finish()
    second = harness.add("second", range(6), new=answer)
    harness.finish()
    assert second.cached_tokens == 5
    assert second.admission is not None
    assert (second.admission.pool_tokens, second.admission.partial_tokens) == (5, 1)


def test_a_prompt_that_leaves_a_full_block_reuses_its_beginning() -> None:
    shared = cache()
    computed(shared, chain(range(12))).release()
    for common in range(13):
        assert hit(shared, chain([*range(common), *range(70, 90 - common)])) == common


def test_of_many_blocks_the_one_with_most_tokens_in_common_is_copied() -> None:
    shared = cache(64)
    for middle in range(20):
        computed(shared, chain([7, middle % 5, middle, 9])).release()
    assert hit(shared, chain([7, 3, 13, 1, 1])) == 3
    assert hit(shared, chain([7, 3, 99, 9, 1])) == 2
    assert hit(shared, chain([7, 99, 13, 9, 1])) == 1


class ComparedChain:
    """A chain that counts how often its tokens are compared with a block's."""

    def __init__(self, tokens: TokenChain) -> None:
        self._chain = tokens
        self.compared = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def __len__(self) -> int:
        return len(self._chain)

    def __getitem__(self, position: int) -> int:
        return self._chain[position]

    def common_tokens(self, start: int, stop: int, encoded: bytes) -> int:
        self.compared += 1
        return self._chain.common_tokens(start, stop, encoded)


def test_two_blocks_are_compared_of_however_many() -> None:
    """By count: finding where to copy from must not take longer with more siblings."""
    shared = cache(2000)
    for number in range(1500):
        computed(shared, chain([7, number % 40, number, 9])).release()
    prompt = ComparedChain(chain([7, 3, 1483, 1, 1]))
    found = shared.longest_child(prompt, 0)
    assert found is not None
    assert (found[1], prompt.compared) == (3, 2)


def test_a_hit_goes_as_far_as_the_tokens_are_the_same() -> None:
    shared = cache()
    left(shared, chain(range(11)))
    assert hit(shared, chain([*range(9), 70, 71, 72])) == 9


def test_at_least_the_last_token_is_left_to_compute() -> None:
    shared = cache()
    left(shared, chain(range(11)))
    assert hit(shared, chain(range(11))) == 10


def test_a_prompt_shorter_than_a_block_can_hit() -> None:
    shared = cache()
    left(shared, chain(range(3)))
    assert hit(shared, chain([0, 1, 8, 9])) == 2


@pytest.mark.parametrize("other", [[*range(8), 70, 71], [70, *range(1, 12)], range(4)])
def test_without_a_common_token_it_stays_for_others(other: list[int]) -> None:
    shared = cache()
    left(shared, chain(range(11)))
    assert hit(shared, chain(other)) in (0, 3, 8)
    assert hit(shared, chain(range(12))) == 11


def test_another_salt_is_another_beginning() -> None:
    shared = cache()
    left(shared, chain(range(3), salt=b"a"))
    assert hit(shared, chain(range(4), salt=b"b")) == 0
    assert hit(shared, chain(range(4), salt=b"a")) == 3


def test_only_who_is_uniform_reuses_it() -> None:
    shared = cache(batch_invariant=False)
    left(shared, chain(range(11)))
    assert shared.pool.num_cached == 2
    assert hit(shared, chain(range(15))) == 8


def test_an_aborted_sequence_leaves_what_it_has_computed() -> None:
    shared = cache()
    left(shared, chain(range(15)), count=6)
    assert hit(shared, chain(range(15))) == 6


def test_several_partial_blocks_follow_one_block() -> None:
    shared = cache()
    first, second = computed(shared, chain([*range(8), 50, 51])), computed(shared, chain([*range(8), 60]))
    first.release()
    second.release()
    shared.pool.check_integrity([])
    assert (shared.pool.num_cached, shared.pool.num_evictable) == (2, 4)
    assert hit(shared, chain([*range(8), 50, 51, 52])) == 10
    assert hit(shared, chain([*range(8), 60, 61])) == 9


def test_one_that_goes_further_in_the_same_way_stays() -> None:
    shared = cache()
    first, second = computed(shared, chain(range(11))), computed(shared, chain(range(10)))
    first.release()
    second.release()
    shared.pool.check_integrity([])
    assert shared.pool.num_evictable == 3
    assert hit(shared, chain(range(12))) == 11


def test_a_partial_block_is_evicted_first_and_without_an_event() -> None:
    shared = cache(4)
    left(shared, chain(range(11)))
    last_event = shared.pool.events.last_sequence
    shared.pool.free(shared.pool.allocate(2))  # one blank slot, and one more
    shared.pool.check_integrity([])
    assert hit(shared, chain(range(12))) == 8
    assert (shared.pool.events.last_sequence, shared.pool.stats.evicted_blocks) == (last_event, 0)


def test_those_who_mirror_the_cache_hear_of_full_blocks_only() -> None:
    shared = cache()
    tokens = chain(range(11))
    left(shared, tokens)
    events = shared.pool.events.since(0)
    assert events is not None
    stored = [event.block_hashes for event in events if isinstance(event, BlockStored)]
    assert stored == [(block_hash,) for block_hash in tokens.block_hashes]
    assert list(shared.pool.snapshot().parents) == tokens.block_hashes


def test_what_is_forgotten_takes_the_partial_block_behind_it_along() -> None:
    shared = cache()
    tokens = chain(range(11))
    left(shared, tokens)
    assert shared.pool.remove(tokens.block_hashes[1:]) == 1
    events = shared.pool.events.since(0)
    assert events is not None
    assert events[-1] == BlockRemoved((tokens.block_hashes[1],), evicted=False)
    computed(shared, chain(range(8))).release()
    assert hit(shared, chain(range(12))) == 8


def test_so_does_the_one_behind_what_is_public() -> None:
    shared = cache()
    ours = TokenChain(root(4), range(10), 4, owner="ann", salt=b"ann", public_blocks=2)
    left(shared, ours)
    shared.pool.remove(ours.block_hashes[1:])
    computed(shared, TokenChain(root(4), range(8), 4, public_blocks=2)).release()
    again = TokenChain(root(4), range(12), 4, owner="ann", salt=b"ann", public_blocks=2)
    assert hit(shared, again) == 8


def test_clearing_forgets_it() -> None:
    shared = cache()
    left(shared, chain(range(11)))
    shared.pool.clear()
    shared.pool.check_integrity([])
    assert (shared.pool.num_cached, hit(shared, chain(range(12)))) == (0, 0)


def test_what_is_not_exact_is_not_left() -> None:
    shared = cache()
    lease = computed(shared, chain(range(11)), count=8)
    lease.context_exact = False  # as behind a block that was loaded
    lease.commit_prefilled(11)
    lease.release()
    assert hit(shared, chain(range(12))) == 8


def test_behind_a_collision_nothing_is_left() -> None:
    shared = cache()
    tokens = chain(range(7))
    known = computed(shared, tokens)
    known.blocks[0].tokens = b"other"  # the same block hash, other tokens
    known.release()
    shared.pool.remove(tokens.block_hashes[1:])
    before = shared.pool.num_evictable
    computed(shared, chain(range(7))).release()
    assert (shared.pool.num_evictable, shared.pool.stats.collisions > 0) == (before, True)


def test_a_full_block_that_another_has_computed_since_is_shared_instead_of_copied() -> None:
    shared = cache()
    left(shared, chain(range(10)))
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    assert late.hit_tokens == 10
    computed(shared, chain(range(12))).release()
    assert late.adopt(10) == 2
    assert (late.hit_tokens, late.num_committed, late.copy) == (12, 3, None)
    shared.pool.check_integrity([late.blocks])
    late.release()
    shared.pool.check_integrity([])


def test_what_others_left_since_is_copied_where_a_chunk_begins() -> None:
    shared = cache()
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    late.commit_prefilled(8)
    left(shared, chain(range(11)))
    assert (late.adopt(8), late.adopt(11)) == (3, 0)
    assert late.copy is not None
    assert (late.hit_tokens, late.copy.num_tokens, late.copy.target) == (3, 3, late.blocks[2])
    late.commit_prefilled(14)
    late.release()
    shared.pool.check_integrity([])


def test_a_block_that_is_waiting_to_be_copied_cannot_be_evicted() -> None:
    shared = cache(6)
    block_id = left(shared, chain(range(11)))
    lease = shared.acquire(chain(range(12)))
    lease.extend(12)
    shared.pool.allocate(shared.pool.num_free)
    assert shared.pool.blocks[block_id].tokens == chain(range(11)).encoded_slice(8, 11)
    lease.release()
    assert shared.pool.num_free == 4


def test_where_the_block_itself_is_needed_the_hit_ends_before_it() -> None:
    shared = cache(4)
    left(shared, chain(range(11)))
    lease = shared.acquire(chain(range(16)))
    assert lease.hit_tokens == 11
    lease.extend(16)
    assert (lease.hit_tokens, lease.copy) == (8, None)
    shared.pool.check_integrity([lease.blocks])
    lease.commit_prefilled(16)
    lease.release()
    assert shared.pool.num_cached == 4


def test_what_was_never_copied_is_not_left() -> None:
    """As when a step fails, or the client leaves before the first chunk."""
    shared = cache()
    left(shared, chain(range(11)))
    before = shared.pool.num_evictable
    for forgotten in (False, True):
        lease = shared.acquire(chain([*range(10), 50, 51]))
        lease.extend(12)
        assert lease.copy is not None
        if forgotten:  # and then no cached block begins with these tokens any more
            shared.pool.clear()
        lease.release()
        shared.pool.check_integrity([])
        assert shared.pool.num_evictable == (0 if forgotten else before)


def test_a_block_that_is_forgotten_before_it_is_copied_can_still_be_copied() -> None:
    shared = cache()
    left(shared, chain(range(11)))
    lease = shared.acquire(chain(range(12)))
    lease.extend(12)
    shared.pool.clear()
    shared.pool.check_integrity([lease.pinned])
    assert lease.copy is not None
    assert lease.copy.source.ref_count == 1
    lease.commit_prefilled(12)
    lease.release()
    shared.pool.check_integrity([])
    assert shared.pool.num_free == 16


def test_the_beginning_of_a_public_block_is_every_tenants_and_what_follows_it_nobody_elses() -> None:
    def prompt(owner: str, tokens: list[int], public_blocks: int) -> TokenChain:
        return TokenChain(root(4), tokens, 4, owner=owner, salt=owner.encode(), public_blocks=public_blocks)

    shared = cache()
    computed(shared, prompt("ann", [*range(8), 50, 51, 52, 53], 2)).release()
    assert hit(shared, prompt("bob", [*range(7), 99, 98], 1)) == 7  # leaves the second public block
    assert hit(shared, prompt("bob", [*range(8), 50, 51, 52, 53], 2)) == 8
    assert hit(shared, prompt("ann", [*range(8), 50, 51, 52, 53], 2)) == 11


def test_without_salts_what_follows_a_public_part_stays_with_those_who_have_none() -> None:
    """A chain without a salt has private blocks under hashes that every tenant computes."""
    shared = cache()
    computed(shared, TokenChain(root(4), [*range(4), 50, 51, 52, 53], 4, owner="", public_blocks=1)).release()
    salted = TokenChain(root(4), [*range(4), 50, 51, 52, 53, 54], 4, owner="bob", salt=b"bob", public_blocks=1)
    assert hit(shared, salted) == 4


def test_only_exact_blocks_are_copied_where_only_such_are_reused() -> None:
    pool = BlockPool(16, 4)
    store = PrefixCache(pool, alignment=4, batch_invariant=True, exact=True)
    blocks = pool.allocate(2)
    pool.free([pool.commit(block, chain(range(8)), at, exact=False) for at, block in enumerate(blocks)])
    assert hit(store, chain(range(7))) == 0


def test_a_block_that_others_hold_cannot_be_left() -> None:
    shared = cache()
    lease = computed(shared, chain(range(8)))
    with pytest.raises(IntegrityError, match="block 0 is committed; only an allocated block can be committed"):
        shared.pool.commit_partial(lease.blocks[0], chain(range(8)), 0, 2)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=12), st.integers(2, 5))
def test_no_cached_block_begins_with_more_of_the_prompt(served: list[list[int]], size: int) -> None:
    shared = PrefixCache(BlockPool(100, size), alignment=size, batch_invariant=True)
    for tokens in served:
        prompt = chain(tokens, block_size=size)
        cached = [block for block in shared.pool.blocks if block.block_hash is not None]
        full = len(shared.match(prompt).blocks)
        rest = prompt.encoded_slice(full * size, min(full * size + size, len(prompt)) - 1)
        common = [common_tokens(block.tokens, rest) for block in cached if block.parent == prompt.parent(full)]
        lease = shared.acquire(prompt)
        assert lease.hit_tokens == full * size + max(common, default=0)
        lease.extend(len(prompt))
        lease.commit_prefilled(len(prompt))
        lease.release()
        shared.pool.check_integrity([])
        partial = [block for block in shared.pool.blocks if block.partial]
        redundant = [
            block
            for block in partial
            for other in shared.pool.blocks
            if other is not block and other.parent == block.parent and other.tokens.startswith(block.tokens)
        ]
        assert not redundant


def test_chunks_end_where_blocks_do_all_the_same() -> None:
    harness = Harness(batch_invariant=True, chunk=8, max_step_tokens=8)
    harness.add("a", range(6))
    harness.finish()
    later = harness.add("b", range(30))
    starts = [(chunk.start, chunk.stop) for _ in range(4) for chunk in harness.step().prefills]
    assert later.cached_tokens == 6
    assert starts == [(6, 12), (12, 20), (20, 28), (28, 30)]


def test_an_answer_is_part_of_what_is_left() -> None:
    harness = Harness(batch_invariant=True)
    first = harness.add("a", range(6), new=5)
    harness.finish()
    assert len(first.chain) == 11
    turn = harness.add("b", [*first.chain.slice(0, 11), 7, 8, 9])
    harness.step()
    assert turn.cached_tokens == 10  # the last token sampled was never computed
    assert turn.admission is not None
    assert (turn.admission.pool_tokens, turn.admission.partial_tokens) == (10, 2)


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing() -> None:
    harness = Harness(batch_invariant=True, max_running=1)
    harness.add("a", range(6), new=3)
    harness.step()
    harness.add("b", range(6))
    harness.scheduler.finish("b", FinishReason.ABORT)
    harness.finish()
    assert harness.pool.num_free == harness.pool.num_blocks
