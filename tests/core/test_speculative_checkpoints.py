"""Checkpoints that no prompt has parted at yet: when they are left, when the oldest is dropped, and when they stay."""

from collections.abc import Callable, Iterable, Sequence

import pytest

from emberkv.core.block import Block
from emberkv.core.block_pool import BlockPool
from emberkv.core.checkpoints import GIVEN_UP_AFTER, TRIED_ONE_IN, CheckpointKind, SpeculativeCheckpoints
from emberkv.core.hashing import TokenChain
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.stats import SchedulerStats
from tests.core.harness import chain, root
from tests.core.test_checkpoints import cache, harness, served
from tests.core.test_partial_blocks import computed, left
from tests.machine import subclasses_core


def shared_by(num_blocks: int, **shares: Share) -> PrefixCache:
    """Blocks of 8 tokens, of owners that have such shares, or all that there is."""
    pool = BlockPool(num_blocks, 8, policy=FairShares(LRU, shares, Share()))
    return PrefixCache(pool, alignment=8, batch_invariant=True, within_blocks=False, branch_tokens=1)


def serve(cache: PrefixCache, tokens: Iterable[int], wanted: Sequence[int] | None = None, owner: str = "") -> int:
    """Computes a prompt that wants such checkpoints, or one before its last token; how many tokens were found."""
    prompt = TokenChain(root(cache.pool.block_size, owner.encode()), tokens, cache.pool.block_size, owner=owner)
    lease = cache.acquire(prompt, [len(prompt) - 1] if wanted is None else wanted)
    lease.extend(len(prompt))
    found = start = lease.hit_tokens
    while start < len(prompt):
        start = lease.cut(start, len(prompt), has_room=True)
        lease.commit_prefilled(start)
    lease.release()
    cache.pool.check_integrity([])
    return found


def test_they_take_blank_blocks_and_then_the_place_of_earlier_ones() -> None:
    """Each prompt takes two blocks and its checkpoint a third."""
    shared = cache(8)
    for first in (100, 200):
        serve(shared, [first, *range(11)])
    stats = shared.pool.stats
    assert (stats.speculative_checkpoints, stats.speculative_unused) == (2, 0)
    serve(shared, [300, *range(11)])
    assert (stats.speculative_checkpoints, stats.speculative_unused, stats.evicted_blocks) == (3, 1, 0)
    found = [shared.cached_tokens(chain([first, *range(10), 90], 8)) for first in (100, 200, 300)]
    assert found == [8, 11, 11]


def test_the_end_of_an_answer_stays_for_another_question() -> None:
    engine = harness()
    served(engine, "first", [*range(11)], new=4)
    said = [*range(11), 1011, 1012, 1013]
    assert served(engine, "next", [*said, *range(20, 26)]) == 14
    assert engine.pool.stats.speculative_checkpoints == 1
    assert served(engine, "edited", [*said, 70, 71, 72]) == 14
    assert (engine.pool.stats.checkpoint_hits, engine.pool.stats.speculative_used) == (2, 1)


def test_without_a_place_the_end_of_an_answer_is_forgotten() -> None:
    shared = cache(6)
    serve(shared, range(12))
    left(shared, chain(range(100, 112), 8))
    computed(shared, chain(range(100, 116), 8)).release()
    assert shared.pool.num_cached == 3
    assert shared.cached_tokens(chain([*range(100, 112), 80], 8)) == 8


def test_the_end_of_an_answer_does_not_take_the_place_of_the_checkpoint_that_is_just_left() -> None:
    shared = cache(8)
    left(shared, chain(range(100, 111), 8))
    for first in (500, 510, 520):
        left(shared, chain([first, *range(8)], 8))
    assert serve(shared, range(100, 115)) == 11
    assert shared.pool.stats.speculative_checkpoints == 1
    assert shared.cached_tokens(chain([*range(100, 114), 90], 8)) == 14
    assert shared.cached_tokens(chain([*range(100, 111), 90], 8)) == 8


def test_one_that_two_prompts_went_on_from_makes_room_for_no_other() -> None:
    shared = cache(8)
    serve(shared, range(12))
    assert [serve(shared, range(12)) for _ in range(2)] == [11, 11]
    for first in (100, 200):
        serve(shared, [first, *range(11)])
    assert shared.cached_tokens(chain([*range(11), 90], 8)) == 11
    assert shared.cached_tokens(chain([100, *range(10), 90], 8)) == 8


def test_one_at_which_prompts_part_makes_room_for_no_other() -> None:
    """One prompt wants it there; another one parts there from a third, and computes it at the same time."""
    shared = cache(10)
    wanted = shared.acquire(chain([*range(5), 50], 8), [5])
    left(shared, chain([*range(5), 60], 8))
    parting = shared.acquire(chain([*range(5), 70], 8))
    for lease in (wanted, parting):
        lease.extend(6)
        assert lease.checkpoint == 5
        lease.commit_prefilled(5)
    stats = shared.pool.stats
    assert (stats.speculative_checkpoints, stats.speculative_used, stats.branch_checkpoints) == (1, 1, 0)
    for lease in (wanted, parting):
        lease.release()
    for first in range(100, 900, 100):
        serve(shared, [first, *range(6)])
    assert shared.cached_tokens(chain([*range(5), 80], 8)) == 5


def test_an_answer_that_ends_where_a_prompt_wants_one_is_speculative_as_well() -> None:
    shared = cache(8)
    left(shared, chain(range(5), 8))
    block = shared.pool.cached.known_partial(chain(range(5), 8), 0, 5)
    assert block is not None
    shared.pool.keep_partial(block, CheckpointKind.HINT)
    assert (shared.pool.stats.speculative_checkpoints, block.keep_when_extended) == (1, True)


@pytest.mark.parametrize("guesses", [False, True])
def test_those_of_a_tenant_at_its_quota_do_not_displace_what_it_asks_for_again(guesses: bool) -> None:
    """Three documents and a prompt's end fill its quota, though the pool has many blank blocks."""
    shared = shared_by(64, ann=Share(0, 8))
    found = 0
    for turn in range(60):
        tokens = [*range(turn % 3 * 1000, turn % 3 * 1000 + 16), *range(50_000 + turn * 10, 50_005 + turn * 10)]
        found += serve(shared, tokens, wanted=None if guesses else (), owner="ann")
    assert found >= 57 * 16 - 32 if guesses else found == 57 * 16
    assert shared.pool.stats.speculative_checkpoints <= 5


def test_a_tenant_whose_checkpoints_are_never_used_leaves_room_for_those_of_another() -> None:
    shared = shared_by(64)
    for number in range(12):
        serve(shared, range(number * 100, number * 100 + 38), owner="ann")
    assert shared.pool.num_free == shared.pool.num_evictable  # none is blank
    repeats = []
    for number in range(60):
        serve(shared, range(9000 + number * 100, 9038 + number * 100), owner="ann")
        prompt = range(90_000 + number * 100, 90_038 + number * 100)
        serve(shared, prompt, owner="bob")
        repeats.append(serve(shared, prompt, owner="bob"))
    assert repeats.count(37) >= 59


def test_where_none_is_used_few_are_tried_and_one_that_is_used_opens_the_way_again() -> None:
    shared = cache(4000)
    for number in range(GIVEN_UP_AFTER + 2 * TRIED_ONE_IN):
        serve(shared, range(number * 100, number * 100 + 6))
    stats = shared.pool.stats
    assert stats.speculative_checkpoints == GIVEN_UP_AFTER + 2
    serve(shared, range(90_000, 90_007), wanted=[5])  # another kind
    assert stats.speculative_checkpoints == GIVEN_UP_AFTER + 3
    assert serve(shared, range(6)) == 5
    serve(shared, range(91_000, 91_006))
    assert stats.speculative_checkpoints == GIVEN_UP_AFTER + 4


def test_a_hit_that_is_given_up_is_no_use_and_checkpoints_are_looked_for_from_where_it_ends() -> None:
    shared = cache(3, branch_tokens=3)
    serve(shared, range(5), wanted=[4])
    lease = shared.acquire(chain([*range(4), *range(50, 67)], 8))
    assert (lease.hit_tokens, lease.checkpoint) == (4, None)
    lease.extend(21)
    assert (lease.hit_tokens, lease.checkpoint) == (0, 4)
    lease.commit_prefilled(21)
    lease.release()
    assert (shared.pool.stats.checkpoint_hits, shared.pool.stats.speculative_used) == (0, 0)


def test_an_admission_after_a_preemption_is_no_second_use() -> None:
    shared = cache()
    serve(shared, range(6))
    for notes_use in (True, False):
        lease = shared.acquire(chain(range(6), 8))
        lease.notes_use = notes_use
        lease.extend(6)
        lease.commit_prefilled(6)
        lease.release()
    assert shared.pool.stats.checkpoint_hits == 1


def test_all_that_were_left_are_used_or_unused_or_cached() -> None:
    shared = cache(12)
    for number in range(30):
        prompt = [number // 2 * 1000, *range(3)]
        serve(shared, prompt)
        computed(shared, chain([*prompt, 1, 2], 8)).release()
    stats = shared.pool.stats
    shared.pool.clear()
    assert stats.speculative_used > 0
    assert stats.speculative_checkpoints == stats.speculative_used + stats.speculative_unused


def speculation(*, owned: float = 64) -> tuple[SpeculativeCheckpoints, list[Block]]:
    """Two speculative checkpoints of 4 and 6 tokens in a pool of 64 blocks of 8."""
    kept = SpeculativeCheckpoints(64, 8, SchedulerStats(), num_owned=lambda _: owned, has_blank_for=lambda _: False)
    blocks = [cached(1, bytes([1]), 4), cached(2, bytes([2]), 6)]
    for block in blocks:
        kept.add(block, CheckpointKind.PROMPT_END)
    return kept, blocks


def cached(block_id: int, block_hash: bytes, num_tokens: int, owner: str = "") -> Block:
    block = Block(block_id)
    block.block_hash, block.num_tokens, block.owner = block_hash, num_tokens, owner
    return block


def full(*names: bytes, owner: str = "") -> list[Block]:
    return [cached(0, name, 8, owner) for name in names]


def test_what_one_saves_raises_the_limit_and_a_block_missed_lowers_it() -> None:
    kept, (first, _) = speculation()
    assert kept.of("").limit == 2
    kept.used(first, 4)
    assert kept.of("").limit == 2.5
    kept.evicted(full(b"a", b"b", b"c"))
    kept.missing([b"a", b"b", b"c", b"x"], 0)  # "a" would be gone without the two checkpoints as well
    assert kept.of("").limit == 2.5
    kept.missing([b"a", b"b", b"c", b"x"], 1)
    assert kept.of("").limit == 0.5
    kept.missing([b"a", b"b", b"c", b"x"], 1)  # counted once
    assert (kept.of("").limit, kept.of("other").limit) == (0.5, 2)
    kept.used(first, 3)
    assert (kept.of("").limit, len(kept)) == (0.875, 1)


def test_the_limit_is_a_part_of_what_the_owner_has() -> None:
    kept, (first, _) = speculation(owned=6)
    assert kept.of("").limit == 1.5
    kept.used(first, 800)
    assert kept.of("").limit == 1.5


def test_a_limit_below_one_is_tried_again_once_in_a_while() -> None:
    kept, _ = speculation()
    kept.evicted(full(b"a", b"b"))
    kept.missing([b"a", b"b"], 0)
    owner = kept.of("")
    assert owner.limit == 0
    tried = [owner.decide_on(CheckpointKind.HINT, has_blank=False) for _ in range(TRIED_ONE_IN)]
    assert tried == [False] * (TRIED_ONE_IN - 1) + [True]
    assert owner.limit == 1


@pytest.mark.parametrize("forget", [lambda kept: kept.forget_evicted([b"a"]), lambda kept: kept.forget_all_evicted()])
def test_what_was_removed_or_is_cached_again_does_not_count_as_evicted(
    forget: Callable[[SpeculativeCheckpoints], None],
) -> None:
    kept, _ = speculation()
    kept.evicted(full(b"a"))
    forget(kept)
    kept.missing([b"a"], 0)
    assert kept.of("").limit == 2


def test_a_block_that_is_evicted_again_is_the_last_one() -> None:
    kept, _ = speculation()
    kept.evicted(full(b"a", b"b", b"a", b"c"))
    kept.missing([b"b"], 0)
    assert kept.of("").limit == 2
    kept.missing([b"a"], 0)
    assert kept.of("").limit == 1


def test_blocks_of_an_owner_without_any_do_not_count() -> None:
    kept, _ = speculation()
    kept.evicted(full(b"a", owner="other"))
    kept.missing([b"a"], 0)
    assert (kept.of("").limit, kept.of("other").limit) == (2, 2)


@subclasses_core
def test_a_use_saves_what_lies_behind_the_next_best_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(BlockPool, "note_use", lambda _, block, tokens: saved.append(tokens))
    shared = cache(200, size=16)
    serve(shared, range(15), wanted=[10, 14])
    assert serve(shared, [*range(14), 50]) == 14
    assert serve(shared, [*range(10), 50]) == 10
    assert saved == [4, 10]
