"""Partial blocks that are copied whole, as where a block has a state after its last token: where they are left, which
of them a prompt goes on from, and what takes their place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.block import Block
from emberkv.core.block_pool import BlockPool
from emberkv.core.cached_blocks import ChildIndex
from emberkv.core.checkpoints import checkpoint_positions
from emberkv.core.hashing import TokenChain, common_tokens, partial_hash, partial_siblings_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.sequence import FinishReason
from emberkv.errors import ConfigError
from tests.core.harness import Harness, chain, root
from tests.core.test_partial_blocks import computed, hit, left
from tests.machine import subclasses_core


def cache(num_blocks: int = 32, *, size: int = 8, branch_tokens: int = 1) -> PrefixCache:
    pool = BlockPool(num_blocks, size)
    return PrefixCache(pool, alignment=size, batch_invariant=True, within_blocks=False, branch_tokens=branch_tokens)


def harness(*, num_blocks: int = 32, branch_tokens: int = 2, chunk: int = 4, max_step_tokens: int = 16) -> Harness:
    """Blocks of 8 tokens and chunks of 4."""
    return Harness(
        num_blocks=num_blocks,
        block_size=8,
        alignment=8,
        chunk=chunk,
        batch_invariant=True,
        within_blocks=False,
        branch_tokens=branch_tokens,
        max_step_tokens=max_step_tokens,
    )


def served(engine: Harness, name: str, tokens: list[int], new: int = 1) -> int:
    """Serves a prompt alone; how many of its tokens were found."""
    sequence = engine.add(name, tokens, new)
    engine.finish()
    admission = sequence.admission
    assert admission is not None
    assert admission.pool_tokens == sequence.cached_tokens
    return sequence.cached_tokens


def test_the_next_turn_goes_on_behind_the_answer() -> None:
    engine = harness()
    assert served(engine, "first", [*range(11)], new=4) == 0
    answer = [1011, 1012, 1013]  # the fourth was never computed
    assert served(engine, "next", [*range(11), *answer, 7, 7]) == 14
    assert engine.pool.stats.branch_checkpoints == 0


def test_a_prompt_that_ends_before_a_checkpoint_does_not_go_on_from_it() -> None:
    shared = cache()
    left(shared, chain(range(14), 8))
    lease = shared.acquire(chain([*range(13), 70], 8))
    assert (lease.hit_tokens, lease.copy) == (8, None)
    lease.release()
    shared.pool.check_integrity([])


def test_a_repeat_leaves_a_checkpoint_before_its_last_token() -> None:
    engine = harness()
    prompt = [*range(14)]
    assert [served(engine, str(turn), prompt, new=3) for turn in range(3)] == [0, 8, 13]
    assert engine.pool.stats.branch_checkpoints == 1


def test_prompts_that_part_within_a_block_leave_a_checkpoint_there() -> None:
    """The first to leave what is known computes up to there in one chunk more; all later ones go on from there."""
    engine = harness()
    served(engine, "first", [*range(13), 60, 61, 62])
    second = engine.add("second", [*range(13), 70, 71, 72, 73])
    cuts = [(chunk.start, chunk.stop) for _ in range(4) for chunk in engine.step().prefills]
    assert second.cached_tokens == 8
    assert cuts == [(8, 12), (12, 13), (13, 16), (16, 17)]
    assert engine.pool.stats.branch_checkpoints == 1
    assert served(engine, "third", [*range(13), 80, 81]) == 13
    assert served(engine, "fourth", [*range(13), 70, 71, 72, 90]) == 16


def test_no_chunk_behind_the_branch_is_computed_in_the_same_step() -> None:
    """The block is copied between two steps, behind the last token before the branch."""
    engine = harness()
    served(engine, "first", [*range(13), 60])
    engine.add("second", [*range(13), 70, 71])
    plan = engine.step()
    assert [(chunk.start, chunk.stop) for chunk in plan.prefills] == [(8, 12), (12, 13)]
    assert [(chunk.start, chunk.stop, chunk.copy is None) for chunk in engine.step().prefills] == [(13, 15, False)]


def test_fewer_tokens_than_a_checkpoint_is_worth_leave_none() -> None:
    engine = harness(branch_tokens=6)
    served(engine, "first", [*range(13), 60])
    assert served(engine, "second", [*range(13), 70]) == 8
    assert served(engine, "third", [*range(13), 71]) == 8
    assert engine.pool.stats.branch_checkpoints == 0


def test_without_a_free_block_none_is_left_and_no_chunk_is_cut() -> None:
    engine = harness(num_blocks=3)
    served(engine, "first", [*range(5), 60])
    engine.add("second", [*range(5), *range(70, 79)])
    cuts = [(chunk.start, chunk.stop) for chunk in engine.step().prefills]
    assert cuts == [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert engine.pool.stats.branch_checkpoints == 0


def test_a_chunk_that_ends_at_the_branch_by_itself_leaves_none_without_room() -> None:
    """The next chunk of the same step is in the same block, and does not look for the branch again."""
    engine = harness(num_blocks=3)
    served(engine, "first", [*range(4), 60])
    engine.add("second", [*range(4), *range(70, 79)])
    cuts = [(chunk.start, chunk.stop) for chunk in engine.step().prefills]
    assert cuts == [(0, 4), (4, 8), (8, 12), (12, 13)]
    assert engine.pool.stats.branch_checkpoints == 0


def test_a_sequence_admitted_in_the_same_step_takes_the_room_of_a_checkpoint() -> None:
    """The decoding one needs a block next, and is not preempted for it."""
    engine = harness(num_blocks=8, chunk=8, max_step_tokens=64)
    served(engine, "first", [*range(5), 60])
    engine.add("decoding", [*range(100, 107)], 8)
    engine.step()
    engine.add("second", [*range(5), *range(70, 75)], 2)
    engine.add("third", [*range(200, 228)], 4)
    plan = engine.step()
    assert [(chunk.start, chunk.stop) for chunk in plan.prefills[:1]] == [(0, 5)]
    engine.finish()
    assert (engine.pool.stats.branch_checkpoints, engine.scheduler.stats.preemptions) == (0, 0)


def test_a_checkpoint_that_is_known_evicts_nothing() -> None:
    """Two prompts leave the same branch, one after the other; for the second a cached block would have to go."""
    shared = cache(4)
    left(shared, chain([*range(5), 60], 8))
    first, second = (computed(shared, chain([*range(5), last], 8), 0) for last in (70, 71))
    first.commit_prefilled(5)
    assert shared.pool.stats.branch_checkpoints == 1
    second.commit_prefilled(5)
    assert shared.pool.stats.branch_checkpoints == 1
    shared.pool.check_integrity([first.pinned, second.pinned])
    first.release()
    second.release()
    assert hit(shared, chain([*range(5), 60, 61], 8)) == 6


def test_a_longer_checkpoint_takes_the_place_of_one_that_ended_there_but_not_of_a_branch() -> None:
    shared = cache(branch_tokens=3)
    left(shared, chain(range(10), 8))
    left(shared, chain(range(12), 8))
    assert shared.pool.num_evictable == 2
    lease = shared.acquire(chain([*range(11), 70, 71], 8))
    lease.extend(13)
    assert (lease.hit_tokens, lease.checkpoint) == (8, 11)
    lease.commit_prefilled(11)
    lease.commit_prefilled(13)
    lease.release()
    left(shared, chain(range(15), 8))
    shared.pool.check_integrity([])
    assert hit(shared, chain([*range(11), 80, 81], 8)) == 11
    assert hit(shared, chain([*range(12), 80], 8)) == 12  # a guess now, since it saves enough
    assert hit(shared, chain([*range(15), 80], 8)) == 15


def test_a_retained_checkpoint_stays_for_all_who_go_on_from_it() -> None:
    """As that at the end of a warm prompt."""
    shared = cache()
    warm = chain(range(12), 8)
    left(shared, warm)
    shared.pool.retain([partial_hash(warm.parent(1), warm.encoded_slice(8, 12))], 5)
    computed(shared, chain(range(16), 8)).release()
    assert shared.pool.num_evictable == 3
    assert hit(shared, chain([*range(12), 80], 8)) == 12


def test_an_unpinned_checkpoint_is_forgotten_like_any_other() -> None:
    shared = cache(branch_tokens=5)
    warm = chain(range(12), 8)
    left(shared, warm)
    end = partial_hash(warm.parent(1), warm.encoded_slice(8, 12))
    shared.pool.retain([end], 5)
    shared.pool.unretain([end])
    computed(shared, chain(range(16), 8)).release()
    assert hit(shared, chain([*range(12), 80], 8)) == 8


def test_a_checkpoint_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="branch_tokens is 0"):
        cache(branch_tokens=0)


def test_a_full_block_forgets_the_checkpoint_that_it_went_on_from() -> None:
    shared = cache(branch_tokens=5)
    left(shared, chain(range(12), 8))
    assert shared.pool.num_evictable == 2
    computed(shared, chain(range(16), 8)).release()
    assert (shared.pool.num_cached, shared.pool.num_evictable) == (2, 2)


def test_a_step_that_fails_leaves_no_checkpoint() -> None:
    """It may have gone on with the state, which then is not the one behind the tokens that are accounted for."""
    for reason, found in ((FinishReason.ERROR, 8), (FinishReason.ABORT, 11)):
        engine = harness(chunk=8)
        engine.add("first", range(11), new=5)
        engine.step()
        if reason is FinishReason.ERROR:
            engine.compute(engine.scheduler.schedule())
        engine.scheduler.finish("first", reason)
        assert served(engine, "second", [*range(11), 7, 7]) == found


def test_what_is_removed_takes_the_checkpoints_behind_it_and_within_it_along() -> None:
    engine = harness()
    served(engine, "first", [*range(13), *range(60, 70)])
    served(engine, "second", [*range(13), *range(70, 80)])
    assert served(engine, "third", [*range(13), 81]) == 13
    full = chain([*range(13), *range(60, 70)], 8).block_hashes
    engine.scheduler.remove(full[1:])
    assert served(engine, "fourth", [*range(13), 82]) == 8
    engine.scheduler.remove(full[:1])
    engine.check()
    assert served(engine, "fifth", [*range(13), 83]) == 0
    engine.pool.clear()
    assert served(engine, "sixth", [*range(13), 84]) == 0


def test_what_is_removed_takes_the_checkpoints_along_that_begin_alike() -> None:
    """Of two answers to one prompt the first ends within the block that the second fills: both hold the prompt."""
    shared = cache()
    left(shared, chain([*range(5), 60], 8))
    left(shared, chain([*range(8), 50, 51], 8))
    full = chain([*range(5), *range(70, 80)], 8)
    left(shared, full)
    assert hit(shared, chain([*range(5), 60, 61, 62], 8)) == 6
    assert shared.pool.remove(full.block_hashes) == 1
    assert hit(shared, chain([*range(5), 60, 61, 62], 8)) == 0
    assert hit(shared, chain([*range(8), 50, 51, 52], 8)) == 10


def test_the_checkpoints_beside_an_evicted_block_are_removed_by_its_parent() -> None:
    shared = cache()
    full = chain([*range(8), *range(70, 80)], 8)
    left(shared, chain([*range(8), *range(70, 73)], 8))
    left(shared, chain([60, 61], 8))
    assert shared.pool.remove([full.block_hashes[1]]) == 0
    assert hit(shared, chain([*range(8), *range(70, 73), 90], 8)) == 11
    assert shared.pool.remove([full.block_hashes[1], partial_siblings_hash(full.parent(1))]) == 0
    shared.pool.check_integrity([])
    assert hit(shared, chain([*range(8), *range(70, 73), 90], 8)) == 8
    assert hit(shared, chain([60, 61, 62], 8)) == 2
    assert partial_siblings_hash(full.parent(1)) not in shared.pool.cached_hashes()


@subclasses_core
def test_checkpoints_are_removed_in_one_pass_over_those_of_each_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many removed blocks have the same parent."""
    shared = cache(100)
    siblings = [chain([each, *range(8)], 8) for each in range(40)]
    for each in siblings:
        left(shared, each)
    left(shared, chain([90], 8))
    asked: list[bytes] = []
    of = ChildIndex.of

    def counted(index: ChildIndex, parent: bytes) -> list[Block]:
        asked.append(parent)
        return of(index, parent)

    monkeypatch.setattr(ChildIndex, "of", counted)
    assert shared.pool.remove([each.block_hashes[0] for each in siblings]) == 40
    assert asked == [root(8)]


def test_tenants_share_the_checkpoints_of_public_blocks_alone() -> None:
    def prompt(owner: str, tokens: list[int], public_blocks: int) -> TokenChain:
        return TokenChain(root(8), tokens, 8, owner=owner, salt=owner.encode(), public_blocks=public_blocks)

    shared = cache()
    left(shared, prompt("ann", [*range(16), 50, 51, 52], 2))
    left(shared, prompt("ann", [*range(16)], 2), count=13)  # ends within the second public block
    assert hit(shared, prompt("bob", [*range(13), 99, 98], 1)) == 13
    assert hit(shared, prompt("bob", [*range(16), 50, 51, 52, 53], 2)) == 16
    assert hit(shared, prompt("ann", [*range(16), 50, 51, 52, 53], 2)) == 19


def test_a_repeat_goes_on_from_the_end_of_the_prompts_first_computation() -> None:
    """The prompt's last token is computed in a chunk of its own, in the step behind that of the others."""
    engine = harness()
    prompt = [*range(14)]
    first = engine.add("first", prompt, 3, checkpoints=(13,))
    assert [(chunk.start, chunk.stop) for chunk in engine.step().prefills] == [(0, 4), (4, 8), (8, 12), (12, 13)]
    assert [(chunk.start, chunk.stop, chunk.copy is None) for chunk in engine.step().prefills] == [(13, 14, False)]
    engine.finish()
    assert (first.cached_tokens, engine.pool.stats.speculative_checkpoints) == (0, 1)
    assert served(engine, "again", prompt, new=5) == 13
    assert served(engine, "edited", [*prompt, 70, 71]) == 13
    assert served(engine, "next", [*prompt, 1014, 1015, 70]) == 16
    assert (engine.pool.stats.branch_checkpoints, engine.pool.stats.checkpoint_hits) == (0, 2)


def test_a_prompt_that_differs_behind_a_border_goes_on_from_there() -> None:
    engine = harness()
    engine.add("first", range(22), checkpoints=(13, 21))
    engine.finish()
    assert engine.pool.stats.speculative_checkpoints == 2
    assert served(engine, "other", [*range(13), 70, 71]) == 13
    assert served(engine, "again", [*range(22)]) == 21


def test_nothing_is_left_where_a_block_a_hit_or_another_checkpoint_ends_near() -> None:
    size = 16
    kept = {
        start: checkpoint_positions([3, 7, 12, 16, 19, 20, 40], start, 40, block_size=size, least=4)
        for start in (0, 5, 17)
    }
    assert kept == {0: [7, 12, 20], 5: [12, 20], 17: []}


def test_a_border_that_is_no_place_within_the_prompt_is_passed_over() -> None:
    engine = harness()
    engine.add("first", range(6), checkpoints=(0, 6, 7, 100))
    engine.finish()
    assert engine.pool.stats.speculative_checkpoints == 0


@pytest.mark.parametrize(("size", "least", "takes"), [(8, 7, True), (8, 8, False)])
def test_blocks_no_larger_than_what_a_checkpoint_saves_take_no_borders(size: int, least: int, takes: bool) -> None:
    shared = cache(size=size, branch_tokens=least)
    assert shared.takes_borders == takes
    lease = shared.acquire(chain(range(30), size), range(30))
    assert bool(lease.checkpoint) == takes
    lease.release()


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=12), st.integers(2, 6))
def test_no_checkpoint_holds_more_of_the_prompt(prompts: list[list[int]], size: int) -> None:
    shared = cache(100, size=size)
    for tokens in prompts:
        prompt = chain(tokens, size)
        full = len(shared.match(prompt).blocks)
        rest = prompt.encoded_slice(full * size, min(full * size + size, len(prompt)) - 1)
        cached = [block for block in shared.pool.blocks if block.block_hash is not None]
        behind = [block for block in cached if block.parent == prompt.parent(full)]
        whole = [block.num_tokens for block in behind if block.partial and rest.startswith(block.tokens)]
        known = max((common_tokens(block.tokens, rest) for block in behind), default=0)
        lease = shared.acquire(prompt)
        lease.extend(len(prompt))
        assert lease.hit_tokens == full * size + max(whole, default=0)
        assert lease.checkpoint == (full * size + known if known > max(whole, default=0) else None)
        if lease.checkpoint is not None:
            lease.commit_prefilled(lease.checkpoint)
        lease.commit_prefilled(len(prompt))
        lease.release()
        shared.pool.check_integrity([])
        assert len({(block.parent, block.tokens) for block in cached}) == len(cached)
