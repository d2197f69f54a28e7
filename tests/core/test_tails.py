"""Partial blocks: what a sequence leaves behind its last full block, and who goes on there."""

import pytest

from emberkv.core.block import BlockState
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import BlockRemoved, BlockStored
from emberkv.core.hashing import TokenChain
from emberkv.core.prefix_cache import Lease, PrefixCache
from emberkv.core.sequence import FinishReason
from emberkv.errors import IntegrityError
from tests.core.harness import Harness, chain, root


def cache(num_blocks: int = 16, *, uniform: bool = True) -> PrefixCache:
    return PrefixCache(BlockPool(num_blocks, 4), alignment=4, uniform=uniform)


def computed(cache: PrefixCache, tokens: TokenChain, count: int | None = None) -> Lease:
    """A lease of which the first ``count`` tokens are computed, or all."""
    lease = cache.acquire(tokens)
    lease.extend(len(tokens))
    lease.commit_prefilled(len(tokens) if count is None else count)
    return lease


def left(cache: PrefixCache, tokens: TokenChain, count: int | None = None) -> int:
    """Computes as much and lets go; the slot of the last block that holds any of it."""
    lease = computed(cache, tokens, count)
    slot = lease.blocks[(len(tokens) if count is None else count) // 4].slot
    lease.release()
    cache.pool.check_integrity()
    return slot


def hit(cache: PrefixCache, tokens: TokenChain) -> int:
    """What is found, and then leased."""
    full = len(cache.match(tokens).blocks)
    tail = cache.tail(tokens, full)
    lease = cache.acquire(tokens)
    assert lease.hit_tokens == 4 * full + (tail[1] if tail is not None else 0)
    lease.release()
    cache.pool.check_integrity([])
    return lease.hit_tokens


def test_who_goes_on_takes_the_partial_block_over() -> None:
    shared = cache()
    slot = left(shared, chain(range(11)))
    lease = shared.acquire(chain(range(15)))
    assert (lease.hit_tokens, lease.num_committed, lease.blocks[2].slot) == (11, 2, slot)
    assert (lease.blocks[2].state, lease.blocks[2].ref_count) == (BlockState.ALLOCATED, 1)
    shared.pool.check_integrity([lease.blocks])
    lease.extend(15)
    lease.commit_prefilled(15)
    assert [block.slot for block in shared.match(chain(range(16))).blocks][2] == slot


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


@pytest.mark.parametrize("other", [[*range(8), 70, 71], [70, *range(1, 12)], range(8)])
def test_without_a_common_token_it_stays_for_others(other: list[int]) -> None:
    shared = cache()
    left(shared, chain(range(11)))
    assert hit(shared, chain(other)) in (0, 4, 8)
    assert hit(shared, chain(range(12))) == 11


def test_another_salt_is_another_beginning() -> None:
    shared = cache()
    left(shared, chain(range(3), salt=b"a"))
    assert hit(shared, chain(range(4), salt=b"b")) == 0
    assert hit(shared, chain(range(4), salt=b"a")) == 3


def test_only_who_is_uniform_reuses_it() -> None:
    shared = cache(uniform=False)
    left(shared, chain(range(11)))
    assert shared.pool.num_cached == 2
    assert hit(shared, chain(range(15))) == 8


def test_an_aborted_sequence_leaves_what_it_has_computed() -> None:
    shared = cache()
    left(shared, chain(range(15)), count=6)
    assert hit(shared, chain(range(15))) == 6


def test_the_latest_takes_the_place_of_the_one_before() -> None:
    shared = cache()
    first, second = computed(shared, chain([*range(8), 50, 51])), computed(shared, chain([*range(8), 60]))
    first.release()
    second.release()
    shared.pool.check_integrity([])
    assert (shared.pool.num_cached, shared.pool.num_evictable) == (2, 3)
    assert hit(shared, chain([*range(8), 50, 51, 52])) == 8
    assert hit(shared, chain([*range(8), 60, 61])) == 9


def test_one_that_goes_further_in_the_same_way_stays() -> None:
    shared = cache()
    first, second = computed(shared, chain(range(11))), computed(shared, chain(range(10)))
    first.release()
    second.release()
    shared.pool.check_integrity([])
    assert shared.pool.num_evictable == 3
    assert hit(shared, chain(range(12))) == 11


def test_it_is_evicted_first_and_without_a_word() -> None:
    shared = cache(4)
    left(shared, chain(range(11)))
    told = shared.pool.events.last_sequence
    shared.pool.free(shared.pool.allocate(2))  # one blank slot, and one more
    shared.pool.check_integrity([])
    assert hit(shared, chain(range(12))) == 8
    assert (shared.pool.events.last_sequence, shared.pool.stats.evicted_blocks) == (told, 0)


def test_those_who_mirror_the_cache_hear_of_full_blocks_only() -> None:
    shared = cache()
    tokens = chain(range(11))
    left(shared, tokens)
    events = shared.pool.events.since(0)
    assert events is not None
    stored = [numbered.event.identities for numbered in events if isinstance(numbered.event, BlockStored)]
    assert stored == [(identity,) for identity in tokens.identities]
    assert list(shared.pool.snapshot().parents) == tokens.identities


def test_what_is_forgotten_takes_the_partial_block_behind_it_along() -> None:
    shared = cache()
    tokens = chain(range(11))
    left(shared, tokens)
    assert shared.pool.remove(tokens.identities[1:]) == 1
    events = shared.pool.events.since(0)
    assert events is not None
    assert events[-1].event == BlockRemoved((tokens.identities[1],), evicted=False)
    computed(shared, chain(range(8))).release()
    assert hit(shared, chain(range(12))) == 8


def test_so_does_the_one_behind_what_is_public() -> None:
    shared = cache()
    ours = TokenChain(root(4), range(10), 4, owner="ann", salt=b"ann", public_blocks=2)
    left(shared, ours)
    shared.pool.remove(ours.identities[1:])
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
    known.blocks[0].tokens = b"other"  # the same identity, other tokens
    known.release()
    shared.pool.remove(tokens.identities[1:])
    before = shared.pool.num_evictable
    computed(shared, chain(range(7))).release()
    assert (shared.pool.num_evictable, shared.pool.stats.collisions > 0) == (before, True)


def test_a_full_block_that_another_has_computed_since_replaces_it() -> None:
    shared = cache()
    left(shared, chain(range(10)))
    late = shared.acquire(chain(range(14)))
    late.extend(14)
    assert late.hit_tokens == 10
    computed(shared, chain(range(12))).release()
    assert late.adopt(10) == 2
    assert (late.hit_tokens, late.num_committed) == (12, 3)
    late.release()
    shared.pool.check_integrity([])


def test_a_block_that_others_hold_cannot_be_left() -> None:
    shared = cache()
    lease = computed(shared, chain(range(8)))
    with pytest.raises(IntegrityError, match="slot 0 is committed; only an allocated block can be left"):
        shared.pool.leave_tail(lease.blocks[0], chain(range(8)), 0, 2)


def test_chunks_end_where_blocks_do_all_the_same() -> None:
    harness = Harness(uniform=True, chunk=8, max_step_tokens=8)
    harness.add("a", range(6))
    harness.finish()
    later = harness.add("b", range(30))
    starts = [(chunk.start, chunk.stop) for _ in range(4) for chunk in harness.step().prefills]
    assert later.cached_tokens == 6
    assert starts == [(6, 12), (12, 20), (20, 28), (28, 30)]


def test_an_answer_is_part_of_what_is_left() -> None:
    harness = Harness(uniform=True)
    first = harness.add("a", range(6), new=5)
    harness.finish()
    assert len(first.chain) == 11
    turn = harness.add("b", [*first.chain.slice(0, 11), 7, 8, 9])
    harness.step()
    assert turn.cached_tokens == 10  # the last token sampled was never computed
    assert turn.admission is not None
    assert (turn.admission.pool_tokens, turn.admission.partial_tokens) == (10, 2)


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing() -> None:
    harness = Harness(uniform=True, max_running=1)
    harness.add("a", range(6), new=3)
    harness.step()
    harness.add("b", range(6))
    harness.scheduler.finish("b", FinishReason.ABORT)
    harness.finish()
    assert harness.pool.num_free == harness.pool.num_blocks
