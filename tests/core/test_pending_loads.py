"""Loads from lower tiers, worked out by hand: 16 blocks of 4 tokens, chunks of 4, unless a test says otherwise."""

from collections.abc import Iterable

import pytest

from emberkv.core.block import MatchEnd
from emberkv.core.loading import Admission, Load, LoadChoice, PendingLookup
from emberkv.core.pending_loads import PROBE_EVERY
from emberkv.core.sequence import FinishReason, SequenceStatus
from emberkv.errors import IntegrityError
from tests.core.harness import Harness, chain
from tests.core.lower import FakeTiers


def stocked(tokens: Iterable[int], tier: str = "disk", *, exact: bool = True) -> FakeTiers:
    """Tiers that have every full block of these tokens."""
    tiers = FakeTiers()
    tiers.put(chain(tokens).block_hashes, tier, exact=exact)
    return tiers


def begin(harness: Harness) -> Load:
    plan = harness.scheduler.schedule()
    harness.check()
    assert (bool(plan), len(plan.loads)) == (False, 1)
    return plan.loads[0]


def choices(harness: Harness) -> dict[LoadChoice, int]:
    return dict(harness.pool.stats.load_choices)


def test_what_a_tier_has_is_loaded_and_then_hit() -> None:
    harness = Harness(lower=stocked(range(16)))
    sequence = harness.add("a", range(18), new=2)
    load = begin(harness)
    assert (load.start, load.stop, [run.tier for run in load.runs], load.break_even_seconds) == (0, 4, ["disk"], None)
    assert (sequence.status, sequence.lease) == (SequenceStatus.LOADING, None)
    scheduler = harness.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.has_work) == (1, 0, False)
    assert harness.pool.num_free == 12
    harness.arrive(load)
    assert (load.arrived, harness.pool.num_free, harness.pool.num_cached) == (4, 16, 4)
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.has_work) == (1, 0, True)
    plan = harness.step()
    assert [(chunk.start, chunk.stop) for chunk in plan.prefills] == [(16, 18)]
    assert (sequence.cached_tokens, dict(sequence.tier_tokens)) == (16, {"disk": 16})
    assert sequence.admission == Admission(0, {"disk": 16}, MatchEnd.LIMIT, partial_tokens=2)
    harness.finish()
    stats = harness.pool.stats
    assert (stats.loaded_blocks, stats.unloaded_blocks, stats.hit_tokens) == (4, 0, 16)
    assert (dict(stats.tier_hit_tokens), choices(harness)) == ({"disk": 16}, {LoadChoice.LOAD: 1})


def test_the_rest_follows_what_the_pool_has() -> None:
    harness = Harness(lower=stocked(range(16)))
    harness.add("first", range(9))
    load = begin(harness)
    harness.arrive(load)
    harness.finish()
    second = harness.add("second", range(18))
    load = begin(harness)
    assert (load.start, load.stop) == (2, 4)
    harness.arrive(load)
    harness.step()
    assert second.admission == Admission(8, {"disk": 8}, MatchEnd.LIMIT, partial_tokens=2)


def test_a_waiting_load_does_not_block_the_line_and_its_waiter_keeps_its_place() -> None:
    harness = Harness(lower=stocked(range(16)), max_step_tokens=4)
    waiter = harness.add("waiter", range(18))
    harness.add("next", [50] * 4, new=8)
    plan = harness.step()
    assert (len(plan.loads), [each.request_id for each in plan.admitted]) == (1, ["next"])
    harness.add("last", [60] * 4)
    harness.arrive(plan.loads[0])
    plan = harness.step()
    assert [each.request_id for each in plan.admitted] == ["waiter", "last"]
    assert waiter.finish_reason is FinishReason.LENGTH
    harness.finish()


def test_two_requests_for_the_same_blocks_share_one_load() -> None:
    tiers = stocked(range(16))
    harness = Harness(lower=tiers)
    first, second = harness.add("a", range(18)), harness.add("b", [*range(12), 99, 98])
    load = begin(harness)
    assert [each.status for each in (first, second)] == [SequenceStatus.LOADING] * 2
    assert choices(harness) == {LoadChoice.LOAD: 1, LoadChoice.SHARED: 1}
    harness.arrive(load)
    harness.step()
    assert (first.cached_tokens, second.cached_tokens) == (16, 12)
    assert (dict(second.tier_tokens), tiers.asked) == ({"disk": 12}, 1)
    harness.finish()


def test_who_shared_a_load_may_begin_one_for_its_own_rest() -> None:
    tiers = stocked(range(8))
    tiers.put(chain([*range(8), *range(50, 58)]).block_hashes[2:], "ram")
    harness = Harness(lower=tiers)
    harness.add("a", range(9))
    other = harness.add("b", [*range(8), *range(50, 59)])
    harness.arrive(begin(harness))
    plan = harness.step()
    assert [(load.start, load.stop) for load in plan.loads] == [(2, 4)]
    harness.arrive(plan.loads[0])
    harness.step()
    assert dict(other.tier_tokens) == {"disk": 8, "ram": 8}
    harness.finish()


def test_a_sequence_loads_once() -> None:
    harness = Harness(lower=stocked(range(16)))
    sequence = harness.add("a", range(18))
    harness.arrive(begin(harness), 1)
    plan = harness.step()
    assert (plan.loads, sequence.cached_tokens) == ([], 4)
    assert sequence.admission == Admission(0, {"disk": 4}, MatchEnd.ABSENT, load_failed_tokens=12, partial_tokens=2)
    assert (harness.pool.stats.loaded_blocks, harness.pool.stats.unloaded_blocks) == (1, 3)


def test_a_preempted_sequence_does_not_load() -> None:
    tiers = FakeTiers()
    harness = Harness(lower=tiers)
    sequence = harness.add("a", range(18), new=4)
    harness.step()
    harness.scheduler._preempt(sequence)
    harness.pool.clear()
    tiers.put(chain(range(16)).block_hashes)
    assert not harness.step().loads
    harness.finish()


@pytest.mark.parametrize(
    ("disk", "token", "choice", "loaded"),
    [
        (1.0, 1.0, LoadChoice.LOAD, 4),
        (3.9, 1.0, LoadChoice.LOAD, 4),
        (4.0, 1.0, LoadChoice.RECOMPUTE_CHEAPER, 0),
        (9.0, 1.0, LoadChoice.RECOMPUTE_CHEAPER, 0),
        (None, 1.0, LoadChoice.LOAD, 4),
        (9.0, None, LoadChoice.LOAD, 4),
    ],
)
def test_load_or_recompute(disk: float | None, token: float | None, choice: LoadChoice, loaded: int) -> None:
    tiers = stocked(range(16))
    tiers.block_seconds = {} if disk is None else {"disk": disk}
    tiers.token_seconds = token
    harness = Harness(lower=tiers)
    sequence = harness.add("a", range(18))
    plan = harness.step()
    assert choices(harness) == {choice: 1}
    assert sum(len(load.blocks) for load in plan.loads) == loaded
    if not loaded:
        assert sequence.admission == Admission(0, {}, MatchEnd.ABSENT, recompute_cheaper_tokens=16, partial_tokens=2)


def test_a_slow_tier_behind_a_fast_one_is_left_alone() -> None:
    tiers = stocked(range(8), "ram")
    tiers.put(chain(range(16)).block_hashes[2:])
    tiers.block_seconds, tiers.token_seconds = {"ram": 0.1, "disk": 9.0}, 1.0
    harness = Harness(lower=tiers)
    sequence = harness.add("a", range(18))
    load = begin(harness)
    assert (load.start, load.stop, load.break_even_seconds) == (0, 2, 8.0)
    harness.arrive(load)
    harness.step()
    expected = Admission(0, {"ram": 8}, MatchEnd.ABSENT, recompute_cheaper_tokens=8, partial_tokens=2)
    assert sequence.admission == expected


def test_waiting_for_a_long_load_of_another_may_be_slower_than_computing() -> None:
    tiers = stocked(range(40))
    tiers.block_seconds, tiers.token_seconds = {"disk": 3.0}, 1.0
    harness = Harness(lower=tiers)
    harness.add("long", range(41))
    short = harness.add("short", range(9))
    plan = harness.step()
    assert [len(load.blocks) for load in plan.loads] == [10]
    assert (short.status, short.cached_tokens) == (SequenceStatus.FINISHED, 0)
    assert choices(harness) == {LoadChoice.LOAD: 1, LoadChoice.RECOMPUTE_CHEAPER: 1}


def test_only_whole_alignment_units_are_loaded() -> None:
    harness = Harness(alignment=8, chunk=8, lower=stocked(range(20)))
    harness.add("a", range(24))
    assert begin(harness).stop == 4
    short = Harness(alignment=8, chunk=8, lower=stocked(range(4)))
    sequence = short.add("a", range(24))
    assert not short.step().loads
    assert choices(short) == {LoadChoice.ALIGNMENT: 1}
    assert sequence.admission == Admission(0, {}, MatchEnd.ABSENT, alignment_tokens=4, partial_tokens=4)


def test_what_the_pool_has_beyond_a_whole_unit_is_not_loaded_again() -> None:
    harness = Harness(alignment=8, chunk=8, lower=stocked(range(16)))
    harness.add("short", range(12), new=2)
    harness.arrive(begin(harness))
    harness.finish()
    assert harness.pool.num_cached == 3
    harness.add("long", range(20))
    load = begin(harness)
    assert (load.start, load.stop) == (3, 4)


def test_exact_mode_loads_exact_blocks_only() -> None:
    harness = Harness(exact=True, lower=stocked(range(16), exact=False))
    harness.add("a", range(18))
    assert not harness.step().loads
    assert choices(harness) == {LoadChoice.ABSENT: 1}


def test_an_inexact_block_is_replaced_by_an_exact_one_from_below() -> None:
    tiers = FakeTiers()
    harness = Harness(exact=True, lower=tiers)
    first = harness.add("a", range(3), new=7)
    harness.finish()
    tokens = first.chain.slice(0, 9)
    tiers.put(chain(tokens).block_hashes)
    second = harness.add("b", tokens)
    harness.arrive(begin(harness))
    harness.step()
    assert (dict(second.tier_tokens), harness.pool.stats.replaced_blocks) == ({"disk": 8}, 2)


def test_no_load_begins_when_the_sequence_does_not_fit() -> None:
    harness = Harness(num_blocks=6, lower=stocked(range(16)))
    harness.add("a", [50] * 10, new=4)
    harness.step()
    waiting = harness.add("b", range(18))
    plan = harness.step()
    assert (plan.loads, waiting.status) == ([], SequenceStatus.WAITING)
    assert [len(load.blocks) for load in harness.step(stopped={"a"}).loads] == []
    assert len(begin(harness).blocks) == 4


def test_no_work_while_a_load_holds_what_the_next_one_needs() -> None:
    harness = Harness(num_blocks=6, lower=stocked(range(16)))
    harness.add("a", range(18))
    load = begin(harness)
    harness.add("b", [50] * 12)
    plan = harness.scheduler.schedule()
    assert (bool(plan), harness.scheduler.has_work) == (False, False)
    harness.scheduler.loaded(load, [])
    assert (harness.scheduler.has_work, harness.pool.num_free) == (True, 6)
    harness.finish()


def test_what_the_pool_found_is_not_evicted_for_the_load() -> None:
    harness = Harness(num_blocks=5, lower=stocked(range(16)))
    harness.add("first", range(8))
    harness.arrive(begin(harness))
    harness.finish()
    harness.add("other", [50] * 11)
    harness.finish()
    assert harness.pool.lookup(chain(range(8)).block_hashes[1]) is not None
    sequence = harness.add("second", range(18))
    load = begin(harness)
    assert load.start == 2
    harness.arrive(load)
    harness.step()
    assert sequence.cached_tokens == 16


def test_an_aborted_waiter_leaves_and_its_load_still_warms() -> None:
    harness = Harness(lower=stocked(range(16)))
    harness.add("a", range(18))
    load = begin(harness)
    harness.scheduler.finish("a", FinishReason.ABORT)
    assert (harness.scheduler.num_waiting, harness.scheduler.loads) == (0, [load])
    harness.arrive(load)
    assert (harness.scheduler.num_waiting, harness.pool.num_cached, harness.pool.num_free) == (0, 4, 16)


def test_somebody_else_computes_it_meanwhile() -> None:
    harness = Harness(lower=stocked(range(16)))
    tiers = harness.lower
    assert tiers is not None
    waiter = harness.add("a", range(18))
    load = begin(harness)
    tiers.block_seconds, tiers.token_seconds = {"disk": 99.0}, 1.0
    load.runs[:] = tiers.find(load.block_hashes, exact=False)
    harness.add("b", range(18), new=4)
    assert harness.step().admitted
    harness.arrive(load)
    assert (harness.pool.stats.duplicate_blocks, load.arrived) == (4, 4)
    harness.step()
    assert waiter.cached_tokens == 16
    harness.finish()


@pytest.mark.parametrize("removed", [None, 2])
def test_what_is_cleared_or_removed_while_it_loads_does_not_come_back(removed: int | None) -> None:
    harness = Harness(lower=stocked(range(16)))
    sequence = harness.add("a", range(18))
    load = begin(harness)
    if removed is None:
        harness.pool.clear()
    else:
        assert harness.scheduler.remove([load.block_hashes[removed]]) == 0
    harness.arrive(load)
    assert (load.arrived, harness.pool.num_cached) == (removed or 0, removed or 0)
    harness.step()
    assert sequence.cached_tokens == 4 * (removed or 0)
    harness.finish()


def test_what_several_loads_bring_does_not_come_back_either() -> None:
    """Of three requests for the same blocks, two shared the load of the first; it fails, and each begins its own."""
    harness = Harness(lower=stocked(range(16)), num_blocks=32)
    for name in "abc":
        harness.add(name, range(18))
    first = begin(harness)
    harness.scheduler.finish("a", FinishReason.ABORT)
    harness.arrive(first, 0)
    loads = harness.scheduler.schedule().loads
    wanted = first.block_hashes[3]
    assert [wanted in load.block_hashes for load in loads] == [True, True]
    harness.scheduler.remove([wanted])
    for load in loads:
        harness.arrive(load)
        assert harness.pool.lookup(wanted) is None


def test_a_cache_that_is_off_never_loads() -> None:
    tiers = stocked(range(16))
    harness = Harness(enabled=False, lower=tiers)
    sequence = harness.add("a", range(18))
    assert (harness.step().loads, tiers.asked) == ([], 0)
    assert sequence.admission == Admission(0, {}, MatchEnd.OFF, partial_tokens=2)


def test_a_load_ends_once_and_with_no_more_than_it_holds() -> None:
    harness = Harness(lower=stocked(range(16)))
    harness.add("a", range(18))
    load = begin(harness)
    with pytest.raises(IntegrityError, match="a load of 4 blocks ended with 5, in flight: True"):
        harness.scheduler.loaded(load, [True] * 5)
    harness.scheduler.loaded(load, [])
    with pytest.raises(IntegrityError, match="in flight: False"):
        harness.scheduler.loaded(load, [])


def test_now_and_then_a_slow_tier_is_tried_again() -> None:
    tiers = stocked(range(16))
    tiers.block_seconds, tiers.token_seconds = {"disk": 9.0}, 1.0
    harness = Harness(lower=tiers)
    begun = []
    for number in range(2 * PROBE_EVERY):
        harness.add(f"{number}", range(18))
        plan = harness.scheduler.schedule()
        begun += [(number, load.stop, load.break_even_seconds) for load in plan.loads]
        for load in plan.loads:
            harness.arrive(load, 0)
        harness.compute(plan)
        harness.complete(plan)
        harness.finish()
        harness.pool.clear()
    assert begun == [(PROBE_EVERY - 1, 4, 16.0), (2 * PROBE_EVERY - 1, 4, 16.0)]
    assert (harness.pool.stats.load_probes, harness.pool.stats.unloaded_blocks) == (2, 8)


def unknown(tokens: Iterable[int]) -> FakeTiers:
    """Tiers that cannot tell without I/O whether they have these blocks."""
    return FakeTiers(pending=set(chain(tokens).block_hashes))


def begin_lookup(harness: Harness) -> PendingLookup:
    plan = harness.scheduler.schedule()
    harness.check()
    assert (bool(plan), plan.loads, len(plan.lookups)) == (False, [], 1)
    return plan.lookups[0]


def test_a_sequence_waits_for_a_look_up_and_then_for_its_load() -> None:
    tiers = unknown(range(16))
    tiers.put(chain(range(4)).block_hashes)
    harness = Harness(lower=tiers)
    sequence = harness.add("a", range(18))
    lookup = begin_lookup(harness)
    assert (lookup.start, lookup.stop, lookup.break_even_seconds) == (1, 4, None)
    assert (sequence.status, harness.scheduler.has_work) == (SequenceStatus.LOADING, False)
    assert choices(harness) == {}
    tiers.put(lookup.block_hashes)
    harness.scheduler.looked_up(lookup)
    harness.arrive(begin(harness))
    harness.step()
    assert (sequence.cached_tokens, dict(sequence.tier_tokens)) == (16, {"disk": 16})
    assert choices(harness) == {LoadChoice.LOAD: 1}
    harness.finish()


def test_what_is_not_known_after_a_look_up_is_a_miss() -> None:
    harness = Harness(lower=unknown(range(16)))
    sequence = harness.add("a", range(18))
    harness.scheduler.looked_up(begin_lookup(harness))
    plan = harness.step()
    assert (plan.admitted, plan.lookups, sequence.cached_tokens) == ([sequence], [], 0)
    assert choices(harness) == {LoadChoice.ABSENT: 1}
    harness.finish()


def test_a_look_up_takes_no_longer_than_computing_would() -> None:
    tiers = unknown(range(16))
    tiers.token_seconds = 0.5
    harness = Harness(lower=tiers)
    harness.add("a", range(18))
    assert begin_lookup(harness).break_even_seconds == 8.0


def test_a_sequence_may_end_while_its_look_up_is_in_progress() -> None:
    harness = Harness(lower=unknown(range(16)))
    harness.add("a", range(18))
    lookup = begin_lookup(harness)
    harness.scheduler.finish("a", FinishReason.ABORT)
    harness.scheduler.looked_up(lookup)
    harness.finish()
    with pytest.raises(IntegrityError, match="a look-up of 4 blocks has ended that is not in progress"):
        harness.scheduler.looked_up(lookup)


def test_others_are_admitted_while_one_waits_for_a_look_up() -> None:
    harness = Harness(lower=unknown(range(16)), max_step_tokens=4)
    waiter = harness.add("waiter", range(18))
    harness.add("next", [50] * 4, new=8)
    plan = harness.step()
    assert [each.request_id for each in plan.admitted] == ["next"]
    harness.add("last", [60] * 4)
    harness.scheduler.looked_up(plan.lookups[0])
    assert harness.step().admitted[0] is waiter
    harness.finish()
