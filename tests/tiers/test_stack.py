"""The stack: what is offered goes down, what is asked for comes up verified, from the fastest tier that has it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.loading import BlockRun
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.jobs import CheckJob, QueuedBlock, StoreJob
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, fetched, inexact, records
from tests.tiers.disks import opened
from tests.tiers.harness import Clock
from tests.tiers.tiers import LARGE, SlowTier
from tests.waiting import DEADLINE

Make = Callable[..., TierManager]
BLOCKS = records(20)
BLOCK_SIZE = len(BLOCKS[0].tokens) // 4
IDS = block_hashes(BLOCKS)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[TierManager] = []

    def get(*tiers: Tier, **settings: object) -> TierManager:
        arguments = {"namespace": NAMESPACE, "queue_bytes": LARGE, **settings}
        made.append(TierManager(tiers, **arguments))  # type: ignore[arg-type]  # settings by name
        return made[-1]

    yield get
    for stack in made:
        stack.close(DEADLINE)


def ram(name: str = "ram", max_bytes: int = LARGE) -> MemoryTier:
    return MemoryTier(max_bytes, name=name)


def offer(stack: TierManager, blocks: Sequence[BlockRecord], owner: str = "") -> None:
    stack.offload([OffloadedBlock(each, owner) for each in blocks])
    assert stack.flush(DEADLINE)


def found(stack: TierManager, blocks: Sequence[BlockRecord], *, exact: bool = False) -> list[tuple[str, int]]:
    return [(run.tier, run.count) for run in stack.find(block_hashes(blocks), exact=exact)]


def test_what_is_offered_is_in_every_tier(make: Make) -> None:
    tiers = ram("fast"), ram("slow")
    stack = make(*tiers)
    offer(stack, BLOCKS, "me")
    for tier in tiers:
        assert tier.load(IDS) == entries(BLOCKS, owner="me")
    assert fetched(stack, BLOCKS) == BLOCKS


def test_each_block_is_found_in_the_fastest_tier_that_has_it(make: Make) -> None:
    fast, middle, slow = tiers = ram("fast"), ram("middle"), ram("slow")
    stack = make(*tiers)
    stored = entries(BLOCKS)
    slow.store(stored[:9])
    middle.store(stored[3:5])
    fast.store([stored[4], stored[6]])
    assert found(stack, BLOCKS) == [("slow", 3), ("middle", 1), ("fast", 1), ("slow", 1), ("fast", 1), ("slow", 2)]
    assert fetched(stack, BLOCKS) == [*BLOCKS[:9], *[None] * 11]


def test_nothing_is_found_beyond_the_first_block_that_is_nowhere(make: Make) -> None:
    tier = ram()
    stack = make(tier)
    tier.store(entries(BLOCKS[1:]))
    assert found(stack, BLOCKS) == []
    assert found(stack, BLOCKS[1:]) == [("ram", 19)]
    assert found(stack, []) == []


def test_look_ups_are_counted_where_no_faster_tier_had_the_block(make: Make) -> None:
    fast, slow = ram("fast"), ram("slow")
    stack = make(fast, slow)
    fast.store(entries(BLOCKS[:2]))
    slow.store(entries(BLOCKS[:5]))
    stack.find(IDS[:8])
    stats = stack.stats()
    assert (stats["fast"].hits, stats["fast"].misses) == (2, 6)
    assert (stats["slow"].hits, stats["slow"].misses) == (3, 3)


def test_peeking_finds_the_same_and_is_counted_nowhere(make: Make) -> None:
    fast, slow = ram("fast"), ram("slow")
    stack = make(fast, slow)
    fast.store(entries(BLOCKS[:2]))
    slow.store(entries(BLOCKS[:5]))
    before = stack.stats()
    assert stack.peek(IDS[:8]) == [BlockRun("fast", 2, None), BlockRun("slow", 3, None)]
    assert stack.peek(IDS[5:]) == []
    assert stack.stats() == before
    assert stack.find(IDS[:8]) == stack.peek(IDS[:8])


def test_a_rounded_block_is_not_found_where_exact_ones_are_asked_for(make: Make) -> None:
    stack = make(ram())
    offer(stack, [*BLOCKS[:2], inexact(BLOCKS[2])])
    assert found(stack, BLOCKS) == [("ram", 3)]
    assert found(stack, BLOCKS, exact=True) == [("ram", 2)]


def test_an_exact_block_takes_a_rounded_one_s_place_in_every_tier(make: Make) -> None:
    stack = make(ram("fast"), ram("slow"))
    offer(stack, [inexact(BLOCKS[0])])
    offer(stack, BLOCKS[:1])
    offer(stack, [inexact(BLOCKS[0])])
    assert fetched(stack, BLOCKS[:1], [BlockRun("slow", 1, None)]) == BLOCKS[:1]
    assert stack.stack_stats().already_stored == 1


def test_what_every_tier_has_is_skipped_before_any_work(make: Make) -> None:
    fast, slow = ram("fast"), ram("slow")
    stack = make(fast, slow)
    offer(stack, BLOCKS[:5])
    fast.remove(IDS[:1])
    offer(stack, BLOCKS[:6])
    stats = stack.stack_stats()
    assert (stats.offered, stats.already_stored, stats.queue_full, stats.queue_bytes) == (11, 4, 0, 0)
    assert [each.stores for each in stack.stats().values()] == [7, 6]


def test_blocks_of_a_slow_tier_are_put_into_the_fast_ones(make: Make) -> None:
    fast, middle, slow = tiers = ram("fast"), ram("middle"), ram("slow")
    stack = make(*tiers)
    slow.store(entries(BLOCKS, owner="me"))
    assert fetched(stack, BLOCKS) == BLOCKS
    assert stack.flush(DEADLINE)
    assert found(stack, BLOCKS) == [("fast", 20)]
    assert fast.load(IDS) == middle.load(IDS) == entries(BLOCKS, owner="me")
    assert (stack.stats()["slow"].loads, stack.stats()["fast"].loads) == (20, 0)


def test_after_a_restart_blocks_come_from_disk(make: Make, tmp_path: Path) -> None:
    before = make(ram(), opened(tmp_path))
    before.offload([OffloadedBlock(each) for each in BLOCKS])
    assert before.close(DEADLINE)
    after = make(ram(), opened(tmp_path))
    assert found(after, BLOCKS) == [("disk", 20)]
    assert fetched(after, BLOCKS) == BLOCKS


def test_bad_bytes_are_refused_removed_and_counted_and_end_the_run(make: Make) -> None:
    tier = ram()
    stack = make(tier)
    stored = entries(BLOCKS)
    stored[5] = entries(BLOCKS[5:6], namespace=OTHER)[0]
    tier.store(stored)
    assert fetched(stack, BLOCKS)[:6] == [*BLOCKS[:5], None]
    stats = stack.stats()["ram"]
    assert (stats.corrupt, stats.entries) == ({"namespace": 1}, 19)
    assert found(stack, BLOCKS) == [("ram", 5)]


def test_bad_bytes_do_not_reach_a_faster_tier(make: Make) -> None:
    fast, slow = ram("fast"), ram("slow")
    stack = make(fast, slow)
    slow.store(entries(BLOCKS[:1], namespace=OTHER))
    assert fetched(stack, BLOCKS[:1]) == [None]
    assert stack.flush(DEADLINE)
    assert fast.stats().entries == 0


def test_remove_takes_what_was_offered_before(make: Make) -> None:
    stack = make(ram("fast"), ram("slow"))
    stack.offload([OffloadedBlock(each) for each in BLOCKS])
    removed = stack.remove(IDS[5:])
    assert {name: each.result(DEADLINE) for name, each in removed.items()} == {
        "fast": RemovalResult(15),
        "slow": RemovalResult(15),
    }
    assert found(stack, BLOCKS) == [("fast", 5)]


def test_clear_takes_all(make: Make) -> None:
    stack = make(ram("fast"), ram("slow"))
    stack.offload([OffloadedBlock(each) for each in BLOCKS])
    cleared = stack.clear()
    assert {name: each.result(DEADLINE) for name, each in cleared.items()} == {
        "fast": RemovalResult(20),
        "slow": RemovalResult(20),
    }
    assert found(stack, BLOCKS) == []


def test_touch_keeps_what_the_pool_itself_serves(make: Make) -> None:
    size = len(entries(BLOCKS[:1])[0].data) + 64
    stack = make(ram(max_bytes=4 * size))
    offer(stack, BLOCKS[:4])
    stack.touch(IDS[:2])
    offer(stack, BLOCKS[10:12])
    assert found(stack, BLOCKS) == [("ram", 2)]
    assert found(stack, BLOCKS[2:4]) == []


def test_what_is_stored_evicted_and_removed_is_an_event(make: Make) -> None:
    size = len(entries(BLOCKS[:1])[0].data) + 64
    stack = make(ram("fast", 2 * size), ram("slow"))
    events: dict[str, list[Event]] = {"fast": [], "slow": []}
    stack.on_event = lambda event: events[event.tier].append(event)
    for block in BLOCKS[:3]:
        offer(stack, [block])
    stack.remove(IDS[1:2])
    stack.clear()
    assert stack.flush(DEADLINE)
    parents = [block.parent for block in BLOCKS]
    stored = [BlockStored((IDS[at],), parents[at], (), BLOCK_SIZE, "fast") for at in range(3)]
    removed = BlockRemoved((IDS[1],), evicted=False, tier="fast")
    evicted = BlockRemoved((IDS[0],), tier="fast")
    assert events["fast"] == [*stored, evicted, removed, AllBlocksCleared("fast")]
    assert events["slow"] == [replace(each, tier="slow") for each in (*stored, removed, AllBlocksCleared())]
    assert stack.stats()["fast"].evictions == 1


def test_blocks_that_are_stored_together_are_one_event(make: Make) -> None:
    stack = make(ram("ram"))
    events: list[Event] = []
    stack.on_event = events.append
    stack.workers[0].run(StoreJob([QueuedBlock(block, "") for block in (*BLOCKS[:3], BLOCKS[5])], 0, 0))
    assert events == [
        BlockStored(tuple(IDS[:3]), BLOCKS[0].parent, (), BLOCK_SIZE, "ram"),
        BlockStored((IDS[5],), BLOCKS[5].parent, (), BLOCK_SIZE, "ram"),
    ]


def test_a_damaged_block_that_is_found_out_is_an_event(make: Make) -> None:
    tier = ram("ram")
    tier.store([replace(entries(BLOCKS[:1])[0], data=b"damaged")])
    stack = make(tier)
    events: list[Event] = []
    stack.on_event = events.append
    assert fetched(stack, BLOCKS[:1]) == [None]
    assert stack.flush(DEADLINE)
    assert events == [BlockRemoved((IDS[0],), evicted=False, tier="ram")]


class LaterTier(MemoryTier):
    """Knows what it has only after a question, as a tier in another process does."""

    @property
    def lookup_seconds(self) -> float:
        return DEADLINE

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        return 0

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        return super().lookup(block_hashes, exact=exact)


def test_of_a_tier_that_answers_later_only_damaged_blocks_are_reported_as_removed(make: Make) -> None:
    tier = LaterTier(LARGE, name="later")
    stored = entries(BLOCKS[:3])
    tier.store([stored[0], replace(stored[1], data=b"damaged"), stored[2]])
    stack = make(tier)
    events: list[Event] = []
    stack.on_event = events.append
    stack.workers[0].run(CheckJob(IDS[:4]))
    assert events == [BlockRemoved((IDS[1],), evicted=False, tier="later")]
    assert tier.query(IDS[:1]) == 1


def test_what_a_tier_that_answers_later_has_stored_of_a_batch_is_reported(make: Make) -> None:
    class Refusing(LaterTier):
        """Takes no more than two blocks of a batch."""

        def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
            return super().store(entries[:2], seen=seen)

    stack = make(Refusing(LARGE, name="later"))
    events: list[Event] = []
    stack.on_event = events.append
    stack.workers[0].run(StoreJob([QueuedBlock(block, "") for block in BLOCKS[:3]], 0, 0))
    assert events == [BlockStored(tuple(IDS[:2]), BLOCKS[0].parent, (), BLOCK_SIZE, "later")]


def test_the_expected_time_is_what_fetches_took(make: Make) -> None:
    clock = Clock()
    tier = SlowTier(clock, lambda blocks: 0.5 * blocks)
    stack = make(tier, clock=clock, readers=1)
    tier.store(entries(BLOCKS))
    assert stack.find(IDS[:3]) == [BlockRun("slow", 3, None)]
    fetched(stack, BLOCKS[:4])
    fetched(stack, BLOCKS[:16])
    (run,) = stack.find(IDS[:10])
    assert run.seconds == pytest.approx(5.0)


def test_latencies_are_counted_by_batch(make: Make) -> None:
    clock = Clock()
    stack = make(SlowTier(clock, lambda blocks: 0.004 * blocks), clock=clock, readers=1)
    offer(stack, BLOCKS)
    fetched(stack, BLOCKS)
    stats = stack.stats()["slow"]
    assert stats.load_latency.count == 3
    assert 1 <= stats.store_latency.count <= 20
    assert stats.store_latency.seconds == pytest.approx(0.08)
    assert stats.load_latency.seconds == pytest.approx(0.08)
    assert (stats.load_latency.counts[6], stats.load_latency.counts[7], stats.load_latency.counts[8]) == (0, 1, 2)


def test_tiers_must_have_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="each needs a name of its own"):
        TierManager([ram(), ram()], namespace=NAMESPACE, queue_bytes=1)
