"""Decode steps that are accounted for at once, against the same steps one by one."""

from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.block_pool import BlockPool
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig, StepPlan
from emberkv.core.sequence import Sequence
from tests.core.harness import chain

SIZE = 4
NEW = 40


def decoding(prompts: list[list[int]], *, blocks: int = 32, max_running: int = 8, **cache: Any) -> Scheduler:
    """A scheduler whose sequences have all computed their prompts; tenants have different weights."""
    pool = BlockPool(blocks, SIZE)
    config = SchedulerConfig(8 * SIZE, 100 * SIZE, max_running, weights={"t0": 3.0, "t1": 7.0})
    scheduler = Scheduler(PrefixCache(pool, alignment=SIZE, **cache), config)
    for number, prompt in enumerate(prompts):
        scheduler.add(Sequence(f"r{number}", chain(prompt), NEW, tenant=f"t{number % 2}"))
    while (plan := scheduler.schedule()).prefills:
        complete(scheduler, plan)
    complete(scheduler, plan)
    return scheduler


def complete(scheduler: Scheduler, plan: StepPlan, steps: int = 1) -> None:
    """All answers are the same tokens, so that sequences of equal prompts fill equal blocks."""
    grow(plan, steps - 1)
    ready = plan.decodes + [chunk.sequence for chunk in plan.prefills if chunk.samples]
    scheduler.complete(plan, {each.request_id: each.num_generated for each in ready}, steps=steps)


def together(scheduler: Scheduler, plan: StepPlan, steps: int) -> None:
    grow(plan, steps)
    scheduler.advance(plan, steps)


def grow(plan: StepPlan, steps: int) -> None:
    for sequence in plan.decodes:
        for _ in range(steps):
            sequence.chain.append(sequence.num_generated)


def state(scheduler: Scheduler) -> list[Any]:
    """All that later decisions depend on, the order of evictions included."""
    pool = scheduler.cache.pool
    pool.check_integrity([each.held.blocks for each in scheduler.running])
    blocks = [(each.block_id, each.state, each.block_hash, each.ref_count, each.exact) for each in pool.blocks]
    leases = [
        (each.num_computed, each.held.num_committed, [block.block_id for block in each.held.blocks])
        for each in scheduler.running
    ]
    counters = [scheduler._waiting.tenants[f"t{number}"] for number in range(2)]
    evicted = [scheduler.cache.pool.policy.evict() for _ in range(pool.num_evictable)]
    return [blocks, leases, counters, pool.cached_hashes(), astuple(pool.stats), evicted]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=3),
    st.booleans(),
)
def test_steps_at_once_leave_what_single_steps_leave(
    prompts: list[list[int]], runs: list[tuple[int, int]], batch_invariant: bool
) -> None:
    """Some of a run's steps by `advance`, the others by `complete`."""
    singly, at_once = (decoding(prompts, blocks=60, batch_invariant=batch_invariant) for _ in range(2))
    for most, before in runs:
        plan = at_once.schedule()
        steps = at_once.steady_steps(plan, most)
        assert steps == most, "60 blocks are enough"
        advanced = min(before, steps - 1)
        together(at_once, plan, advanced)
        complete(at_once, plan, steps - advanced)
        for _ in range(steps):
            complete(singly, singly.schedule())
    assert state(at_once) == state(singly)


def test_a_plan_holds_until_its_sequences_may_lack_blocks() -> None:
    scheduler = decoding([[1] * 3, [2] * 3], blocks=16)
    plan = scheduler.schedule()
    assert [len(each.chain) for each in plan.decodes] == [5, 5]
    assert scheduler.cache.pool.num_free == 12
    assert scheduler.steady_steps(plan, 100) == 6 * SIZE, "each may fill 6 of the 12 free blocks"
    assert scheduler.steady_steps(plan, 10) == 10


def test_within_blocks_a_plan_holds_until_one_is_full() -> None:
    scheduler = decoding([[1] * 3, [2] * 5])
    plan = scheduler.schedule()
    assert [len(each.chain) for each in plan.decodes] == [5, 7]
    assert scheduler.steady_steps(plan, 100, within_blocks=True) == 2


@pytest.mark.parametrize(("blocks", "max_running"), [(16, 1), (3, 8)])
def test_without_blocks_to_spare_a_plan_holds_until_a_block_is_full(blocks: int, max_running: int) -> None:
    """The second sequence waits; or the pool has one block left for two sequences."""
    pool = BlockPool(blocks, SIZE)
    scheduler = Scheduler(PrefixCache(pool, alignment=SIZE), SchedulerConfig(SIZE, 4 * SIZE, max_running))
    for number in range(2):
        scheduler.add(Sequence(f"r{number}", chain([number] * 2), max_new_tokens=8))
    complete(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert len(plan.decodes) == (1 if max_running == 1 else 2)
    assert scheduler.steady_steps(plan, 100) == 2, "lengths are 3, and 4 fill a block"


def test_a_plan_that_prefills_is_planned_once() -> None:
    scheduler = decoding([[1] * 3])
    scheduler.add(Sequence("late", chain([2] * 3), NEW))
    assert scheduler.steady_steps(scheduler.schedule(), 100) == 1
