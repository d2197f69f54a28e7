"""Checkpoints that lower tiers have: which of them a prompt loads, what removes one on its way, and which are stored.

Blocks of 8 tokens and chunks of 4; a checkpoint that saves 2 tokens is worth its block.
"""

from collections.abc import Iterable

import pytest

from emberkv.core.block import Block, MatchEnd
from emberkv.core.explaining.explain import admission_outcome, explain, look_up
from emberkv.core.explaining.explanation import CacheOutcome, Miss, MissReason
from emberkv.core.explaining.ledger import Ledger
from emberkv.core.hashing import PUBLIC_OWNER, TokenChain, partial_siblings_hash
from emberkv.core.loading import Admission, Load, LoadChoice, StoredPartial
from emberkv.core.pending_loads import PROBE_EVERY
from emberkv.core.sequence import FinishReason, Sequence
from tests.core.harness import Harness, chain, root
from tests.core.lower import FakeTiers

SIZE = 8


def engine(tiers: FakeTiers, *, num_blocks: int = 16, branch_tokens: int = 2) -> Harness:
    return Harness(
        num_blocks=num_blocks,
        block_size=SIZE,
        alignment=SIZE,
        chunk=4,
        batch_invariant=True,
        within_blocks=False,
        branch_tokens=branch_tokens,
        lower=tiers,
    )


def stocked(tokens: Iterable[int], count: int, blocks: int = 1) -> FakeTiers:
    """Tiers that have the first blocks of these tokens, and behind them a checkpoint of ``count`` tokens."""
    tiers, prompt = FakeTiers(), chain(tokens, SIZE)
    tiers.put(prompt.block_hashes[:blocks])
    tiers.put_partial(prompt, blocks, count)
    return tiers


def begin(harness: Harness) -> Load:
    (load,) = harness.scheduler.schedule().loads
    harness.check()
    return load


def test_the_hit_ends_at_the_checkpoint_behind_the_loaded_blocks() -> None:
    harness = engine(stocked(range(14), 5))
    sequence = harness.add("a", range(14))
    load = begin(harness)
    assert (load.start, load.stop, len(load.blocks), len(load.block_hashes)) == (0, 1, 2, 2)
    assert [(run.tier, run.count) for run in load.all_runs] == [("disk", 1), ("disk", 1)]
    harness.arrive(load)
    assert (load.arrived, load.partial_arrived) == (1, True)
    plan = harness.step()
    assert [(chunk.start, chunk.stop) for chunk in plan.prefills] == [(13, 14)]
    assert sequence.admission == Admission(0, {"disk": 13}, MatchEnd.LIMIT, partial_tokens=1)
    harness.finish()
    stats = harness.pool.stats
    assert (stats.loaded_blocks, stats.loaded_checkpoints, stats.unloaded_blocks, stats.checkpoint_hits) == (1, 1, 0, 1)
    assert dict(stats.tier_hit_tokens) == {"disk": 13}
    assert stats.checkpoints["loaded"] == 1


def test_it_is_loaded_alone_where_the_pool_has_all_blocks() -> None:
    harness = engine(FakeTiers())
    harness.add("first", range(9))
    harness.finish()
    assert harness.lower is not None
    harness.lower.put_partial(chain(range(14), SIZE), 1, 5)
    sequence = harness.add("second", range(14))
    load = begin(harness)
    assert (load.start, load.stop, len(load.blocks)) == (1, 1, 1)
    harness.arrive(load)
    harness.step()
    assert sequence.admission == Admission(8, {"disk": 5}, MatchEnd.LIMIT, partial_tokens=1)
    assert dict(harness.pool.stats.load_choices) == {LoadChoice.ABSENT: 1, LoadChoice.LOAD: 1}
    harness.finish()


def test_a_prompt_shorter_than_a_block_loads_one_too() -> None:
    harness = engine(stocked(range(6), 5, blocks=0))
    sequence = harness.add("a", range(6))
    harness.arrive(begin(harness))
    harness.step()
    assert dict(sequence.tier_tokens) == {"disk": 5}
    harness.finish()


def test_the_longest_is_loaded_that_leaves_a_token_to_compute() -> None:
    tiers = stocked(range(15), 3)
    tiers.put_partial(chain(range(15), SIZE), 1, 5)
    tiers.put_partial(chain(range(15), SIZE), 1, 7)
    harness = engine(tiers)
    sequence = harness.add("a", range(15))
    load = begin(harness)
    assert load.partial is not None
    assert load.partial.count == 5
    harness.arrive(load)
    harness.step()
    assert sequence.cached_tokens == 13
    harness.finish()


def test_one_of_other_tokens_or_another_tenant_is_not_found() -> None:
    tiers = stocked([*range(12), 99], 5)
    tiers.put_partial(chain(range(14), SIZE, b"other"), 1, 5)
    harness = engine(tiers)
    harness.add("a", range(14))
    load = begin(harness)
    assert (load.stop, load.partial) == (1, None)
    harness.arrive(load)
    harness.finish()


@pytest.mark.parametrize(("stored", "is_loaded"), [(5, False), (6, True)])
def test_it_has_to_save_more_than_the_pool_s_own(stored: int, is_loaded: bool) -> None:
    """The pool's ends behind 12 tokens."""
    harness = engine(FakeTiers(), branch_tokens=2)
    harness.add("first", range(12), new=1)
    harness.finish()
    assert harness.lower is not None
    harness.lower.put_partial(chain(range(16), SIZE), 1, stored)
    sequence = harness.add("second", [*range(15), 70])
    plan = harness.scheduler.schedule()
    assert len(plan.loads) == is_loaded
    if is_loaded:
        harness.arrive(plan.loads[0])
        harness.finish()
        assert (sequence.cached_tokens, dict(sequence.tier_tokens)) == (14, {"disk": 6})
    else:
        assert sequence.cached_tokens == 12


def test_one_that_takes_longer_than_computing_is_left_but_tried_now_and_then() -> None:
    tiers = FakeTiers(block_seconds={"disk": 6.0}, token_seconds=1.0)
    harness = engine(tiers, num_blocks=64)
    loaded = []
    for turn in range(PROBE_EVERY):
        prompt = [turn, *range(5)]
        tiers.put_partial(chain(prompt, SIZE), 0, 5)
        harness.add(f"{turn}", prompt)
        plan = harness.scheduler.schedule()
        loaded += [turn] * len(plan.loads)
        if plan.loads:
            harness.arrive(plan.loads[0])
        else:
            harness.compute(plan)
            harness.complete(plan)
        harness.finish()
    assert loaded == [PROBE_EVERY - 1]
    assert dict(harness.pool.stats.load_choices) == {LoadChoice.RECOMPUTE_CHEAPER: PROBE_EVERY - 1, LoadChoice.LOAD: 1}
    tiers.block_seconds["disk"] = 4.0
    tiers.put_partial(chain([99, *range(5)], SIZE), 0, 5)
    harness.add("faster", [99, *range(5)])
    load = begin(harness)
    assert load.break_even_seconds == 5.0
    harness.arrive(load)
    harness.finish()


def test_two_prompts_share_the_load_of_one() -> None:
    harness = engine(stocked(range(6), 5, blocks=0))
    first, second = harness.add("a", range(6)), harness.add("b", [*range(5), 50, 51])
    load = begin(harness)
    assert dict(harness.pool.stats.load_choices) == {LoadChoice.LOAD: 1, LoadChoice.SHARED: 1}
    harness.arrive(load)
    harness.finish()
    assert [dict(each.tier_tokens) for each in (first, second)] == [{"disk": 5}] * 2
    assert harness.pool.stats.loaded_checkpoints == 1


def test_where_it_does_not_arrive_the_hit_ends_at_the_block() -> None:
    harness = engine(stocked(range(14), 5))
    sequence = harness.add("a", range(14))
    load = begin(harness)
    harness.arrive(load, 1)
    harness.finish()
    assert (load.arrived, load.partial_arrived, sequence.cached_tokens) == (1, False, 8)
    stats = harness.pool.stats
    assert (stats.loaded_checkpoints, stats.checkpoints["not_loaded"], stats.unloaded_blocks) == (0, 1, 0)
    assert sequence.admission == Admission(0, {"disk": 8}, MatchEnd.LIMIT, load_failed_tokens=5, partial_tokens=1)
    outcome = admission_outcome(sequence.admission, 14)
    explained = explain(Ledger(), chain(range(14), SIZE), outcome, hit_unit=SIZE, checkpoints=True)
    expected = [Miss(MissReason.LOAD_FAILED, 8, 5), Miss(MissReason.PARTIAL, 13, 1)]
    assert (explained.hit, list(explained.misses)) == ({"disk": 8}, expected)


def test_sequences_that_wait_for_one_in_vain_account_for_it_if_it_is_theirs() -> None:
    """All three have the first block in common, and two of them the checkpoint's tokens."""
    tiers = stocked(range(14), 5)
    harness = engine(tiers)
    prompts = [range(14), [*range(13), 40, 41], [*range(8), *range(50, 56)]]
    sequences = [harness.add(str(number), tokens) for number, tokens in enumerate(prompts)]
    load = begin(harness)
    tiers.places.popitem()
    harness.arrive(load)
    harness.finish()
    assert dict(harness.pool.stats.load_choices) == {LoadChoice.LOAD: 1, LoadChoice.SHARED: 2}
    expected = [Admission(0, {"disk": 8}, MatchEnd.LIMIT, load_failed_tokens=5, partial_tokens=left) for left in (1, 2)]
    expected.append(Admission(0, {"disk": 8}, MatchEnd.LIMIT, partial_tokens=6))
    assert [each.admission for each in sequences] == expected


def test_one_that_is_declined_behind_cached_blocks_is_counted() -> None:
    harness = engine(FakeTiers(block_seconds={"disk": 6.0}, token_seconds=1.0))
    harness.add("first", range(9))
    harness.finish()
    assert harness.lower is not None
    harness.lower.put_partial(chain(range(14), SIZE), 1, 5)
    sequence = harness.add("second", range(14))
    assert harness.step().loads == []
    assert harness.pool.stats.load_choices[LoadChoice.RECOMPUTE_CHEAPER] == 1
    assert sequence.admission == Admission(9, {}, MatchEnd.LIMIT, recompute_cheaper_tokens=4, partial_tokens=1)
    harness.finish()


def test_one_that_is_declined_behind_loaded_blocks_is_accounted_for() -> None:
    tiers = stocked(range(14), 5)
    tiers.block_seconds, tiers.token_seconds = {"disk": 6.0}, 1.0
    harness = engine(tiers)
    sequence = harness.add("a", range(14))
    load = begin(harness)
    assert (load.num_full, load.partial) == (1, None)
    harness.arrive(load)
    harness.finish()
    expected = Admission(0, {"disk": 8}, MatchEnd.LIMIT, recompute_cheaper_tokens=5, partial_tokens=1)
    assert sequence.admission == expected


def test_one_that_is_declined_after_a_wait_in_vain_for_its_block_is_counted_once() -> None:
    """The load that was shared was to bring the whole block that begins with the checkpoint's tokens."""
    tiers, prompt = FakeTiers(), chain(range(26), SIZE)
    tiers.put(prompt.block_hashes[:3])
    tiers.put_partial(prompt, 1, 5)
    harness = engine(tiers)
    harness.add("a", range(26))
    sequence = harness.add("b", range(26))
    load = begin(harness)
    assert dict(harness.pool.stats.load_choices) == {LoadChoice.LOAD: 1, LoadChoice.SHARED: 1}
    harness.scheduler.finish("a", FinishReason.ABORT)
    for block_hash in prompt.block_hashes[1:3]:
        del tiers.places[block_hash]
    tiers.block_seconds, tiers.token_seconds = {"disk": 6.0}, 1.0
    harness.arrive(load)
    harness.finish()
    assert harness.pool.stats.load_choices[LoadChoice.RECOMPUTE_CHEAPER] == 1
    assert sequence.admission == Admission(
        0, {"disk": 8}, MatchEnd.ABSENT, recompute_cheaper_tokens=5, load_failed_tokens=11, partial_tokens=2
    )


def test_it_is_not_kept_where_a_block_before_it_does_not_arrive() -> None:
    harness = engine(stocked(range(14), 5))
    sequence = harness.add("a", range(14))
    load = begin(harness)
    harness.scheduler.loaded(load, [])
    harness.check()
    assert harness.pool.num_evictable == 0
    harness.finish()
    assert sequence.admission == Admission(0, {}, MatchEnd.ABSENT, load_failed_tokens=13, partial_tokens=1)


@pytest.mark.parametrize("named", ["before", "siblings", "beside", "itself"])
def test_a_removal_keeps_one_on_its_way_from_arriving(named: str) -> None:
    """By the block before it, in the pool or on its way, by its parent, and by a cached block beside it."""
    prompt = chain(range(14), SIZE)
    harness = engine(FakeTiers())
    harness.add("first", [*range(8), *range(50, 59)])  # the block before it, and one beside it
    harness.finish()
    assert harness.lower is not None
    checkpoint = harness.lower.put_partial(prompt, 1, 5)
    sequence = harness.add("a", range(14))
    load = begin(harness)
    beside = chain([*range(8), *range(50, 59)], SIZE).block_hashes[1]
    names = {
        "before": prompt.block_hashes[0],
        "siblings": partial_siblings_hash(prompt.parent(1)),
        "beside": beside,
        "itself": checkpoint,
    }
    harness.scheduler.remove([names[named]])
    harness.arrive(load)
    assert not load.partial_arrived
    assert harness.pool.lookup(checkpoint) is None
    harness.finish()
    assert dict(sequence.tier_tokens) == {}


def tenant(name: str, tokens: Iterable[int], public_blocks: int) -> TokenChain:
    return TokenChain(root(SIZE), tokens, SIZE, owner=name, salt=name.encode(), public_blocks=public_blocks)


@pytest.mark.parametrize("is_public", [False, True])
def test_a_removal_of_the_public_block_before_one_takes_it_along(is_public: bool) -> None:
    """One that names the partial blocks behind it takes those of the tenant, or those of the public prefix."""
    prompt = tenant("ann", range(14), 1)
    partial = StoredPartial("disk", bytes(32), 5, None, public=is_public)
    load = Load(prompt, 0, [], [Block(0), Block(1)], None, partial)
    public, private = prompt.unsalted_parent(1), prompt.parent(1)
    names = [public, partial_siblings_hash(private), partial_siblings_hash(public), private]
    assert [load.partial_is_removed_with({each}) for each in names] == [True, not is_public, is_public, False]


def test_a_public_prefix_s_is_loaded_where_a_prompt_becomes_private_and_stays_public() -> None:
    tiers, whole = FakeTiers(), tenant("ann", range(20), 2)
    tiers.put(whole.block_hashes[:1])
    checkpoint = tiers.put_partial(whole, 1, 5)
    harness = engine(tiers)
    sequence = Sequence("a", tenant("bob", range(14), 1), 1)
    harness.scheduler.add(sequence)
    load = begin(harness)
    assert load.partial == StoredPartial("disk", checkpoint, 5, None, public=True)
    harness.arrive(load)
    (chunk,) = harness.scheduler.schedule().prefills
    assert (load.partial_arrived, chunk.start, dict(sequence.tier_tokens)) == (True, 13, {"disk": 13})
    assert chunk.copy is not None
    block = chunk.copy.source
    assert (block.block_hash, block.owner) == (checkpoint, PUBLIC_OWNER)
    assert (block.parent, block.previous) == (whole.block_hashes[0], whole.block_hashes[0])
    others = tenant("carl", range(15), 1)
    assert harness.cache.longest_child(others, 1) == (block, 5)
    assert harness.pool.remove([partial_siblings_hash(whole.block_hashes[0])]) == 0
    assert harness.cache.longest_child(others, 1) is None


def test_a_public_prefix_s_that_is_loaded_takes_the_place_of_no_tenant_s() -> None:
    """But of a shorter one of the same prefix."""
    tiers, whole, prompt = FakeTiers(), tenant("ann", range(20), 2), tenant("bob", range(15), 1)
    checkpoint = tiers.put_partial(whole, 1, 6)
    harness = engine(tiers, branch_tokens=4)
    pool, kept = harness.pool, []
    for each, count in ((whole, 2), (prompt, 3)):
        source = pool.allocate(1)
        assert pool.commit_partial(source[0], each, 1, count)
        pool.free(source)
        kept.append(source[0].block_hash)
    blocks = pool.reserve_for_load(1)
    load = Load(prompt, 1, [], blocks, None, tiers.find_partial(prompt, 1, 1, 6))
    assert load.partial is not None
    assert pool.complete_partial_load(load, load.partial, arrived=True)
    assert [pool.lookup(each) is not None for each in (*kept, checkpoint) if each] == [False, True, True]


def test_where_a_sequence_has_left_it_meanwhile_no_second_one_is_kept() -> None:
    harness = engine(stocked(range(6), 5, blocks=0))
    harness.add("a", range(6))
    load = begin(harness)
    source = harness.pool.allocate(1)
    assert harness.pool.commit_partial(source[0], chain(range(6), SIZE), 0, 5)
    harness.pool.free(source)
    harness.scheduler.loaded(load, [True])
    assert (load.partial_arrived, harness.pool.num_evictable) == (False, 1)
    assert harness.pool.stats.unloaded_checkpoints == 0


def test_what_is_stored_is_ends_and_branches_at_once_and_guesses_when_they_are_used() -> None:
    harness = engine(FakeTiers())
    tiers = harness.lower
    assert tiers is not None

    def stored(tokens: list[int], count: int) -> bool:
        prompt = chain(tokens, SIZE)
        return FakeTiers().put_partial(prompt, 1, count) in tiers.places

    prompt = [*range(14)]
    harness.add("first", prompt, new=1)
    harness.finish()
    assert stored(prompt, 6)  # where the sequence ended
    tiers.places.clear()
    border = [*range(100, 108), *range(7)]
    harness.add("guess", [*border[:12], 60, 61, 62, 63, 64], checkpoints=(12,))
    harness.finish()
    assert not stored(border, 4)
    harness.add("use", [*border[:12], 70, 71])
    harness.finish()
    assert stored(border, 4)
    tiers.places.clear()
    harness.add("part", [*range(10), 80, 81, 82, 83, 84, 85, 86])
    harness.finish()
    assert harness.pool.stats.branch_checkpoints == 1
    assert stored(prompt, 2)


def test_what_saves_too_little_is_not_stored() -> None:
    harness = engine(FakeTiers(), branch_tokens=6)
    harness.add("first", range(13), new=1)
    harness.finish()
    assert harness.lower is not None
    assert set(harness.lower.places) == set(chain(range(13), SIZE).block_hashes)
    assert harness.pool.lookup(FakeTiers().put_partial(chain(range(13), SIZE), 1, 5)) is not None


def test_what_was_loaded_is_not_stored_again() -> None:
    tiers = stocked(range(14), 5)
    harness = engine(tiers)
    harness.add("a", range(14))
    harness.arrive(begin(harness))
    assert harness.pool.take_committed() == []
    harness.finish()


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_sequence_that_goes_on_replaces_one_unless_it_is_to_be_kept(is_kept: bool) -> None:
    """One that is replaced stays as a speculative checkpoint, which takes some of these few."""
    harness = engine(stocked(range(14), 5))
    harness.add("a", range(14))
    load = begin(harness)
    load.keep_when_extended = is_kept
    harness.arrive(load)
    harness.finish()
    block = harness.pool.lookup(load.block_hashes[-1])
    assert block is not None
    assert (block.keep_when_extended, harness.pool.stats.speculative_checkpoints) == (True, not is_kept)


def test_a_look_up_says_that_a_load_would_bring_it() -> None:
    prompt = chain(range(14), SIZE)
    harness = engine(stocked(range(14), 5))
    assert harness.lower is not None
    assert look_up(harness.cache, harness.lower, prompt) == CacheOutcome({"disk": 13})
    harness.lower.token_seconds = 1.0
    harness.lower.block_seconds = {"disk": 6.0}
    declined = {MissReason.RECOMPUTE_CHEAPER: 5}
    assert look_up(harness.cache, harness.lower, prompt) == CacheOutcome({"disk": 8}, declined)
