"""The stack's threads: bounded, fair, in order, and not to be stopped by anything."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import count

import pytest

from emberkv.core.loading import BlockRun
from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.onboarding import PIECE_BLOCKS, Onboarding
from tests.tiers.build import NAMESPACE, block_hashes, entries, fetched, records
from tests.tiers.tiers import LARGE, BrokenTier, GatedTier
from tests.waiting import DEADLINE

BLOCKS = records(40)
OTHERS = records(4, seed=1)
IDS = block_hashes(BLOCKS)
OFFER_BYTES = len(BLOCKS[0].payload) + len(BLOCKS[0].tokens)
Outcome = Future[list[BlockRecord | None]]


@pytest.fixture
def tier() -> GatedTier:
    return GatedTier()


@pytest.fixture
def stack(tier: GatedTier) -> Iterator[TierManager]:
    stack = TierManager([tier], namespace=NAMESPACE, queue_bytes=5 * OFFER_BYTES, readers=1)
    yield stack
    tier.gate.set()
    stack.close(DEADLINE)


def close_gate(tier: GatedTier) -> None:
    tier.began.clear()
    tier.gate.clear()


def start(stack: TierManager, blocks: list[BlockRecord]) -> tuple[Onboarding, Outcome]:
    outcome: Outcome = Future()
    wanted = block_hashes(blocks)
    return stack.onboard(wanted, stack.find(wanted), outcome.set_result), outcome


def test_the_queue_is_bounded_and_what_does_not_fit_is_skipped(tier: GatedTier, stack: TierManager) -> None:
    close_gate(tier)
    stack.offload([OffloadedBlock(each) for each in BLOCKS[:9]])
    assert tier.began.wait(DEADLINE)
    stats = stack.stack_stats()
    assert (stats.offered, stats.queue_full, stats.queue_bytes) == (9, 4, 5 * OFFER_BYTES)
    assert not stack.flush(0)
    tier.gate.set()
    assert stack.flush(DEADLINE)
    assert (stack.stats()["gated"].entries, stack.stack_stats().queue_bytes) == (5, 0)


def test_a_touch_never_waits_either(tier: GatedTier, stack: TierManager) -> None:
    close_gate(tier)
    stack.offload([OffloadedBlock(each) for each in BLOCKS[:5]])
    for _ in range(100):
        stack.touch(IDS)
    assert stack.stack_stats().queue_bytes <= 5 * OFFER_BYTES


def test_a_look_up_does_not_wait_for_a_load(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries(BLOCKS))
    close_gate(tier)
    _, outcome = start(stack, BLOCKS)
    assert tier.began.wait(DEADLINE)
    assert [run.count for run in stack.find(IDS)] == [40]
    assert not outcome.done()


def test_fetches_take_turns(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries([*BLOCKS, *OTHERS]))
    close_gate(tier)
    _, long = start(stack, BLOCKS)
    assert tier.began.wait(DEADLINE)
    _, short = start(stack, OTHERS)
    tier.gate.set()
    assert (long.result(DEADLINE), short.result(DEADLINE)) == (BLOCKS, OTHERS)
    assert tier.loads.index(tuple(block_hashes(OTHERS))) <= 2
    assert len(tier.loads) == 40 // PIECE_BLOCKS + 1


def test_one_fetch_is_read_by_all_loaders_at_once() -> None:
    meeting, loads = threading.Barrier(3), count()

    class MeetingTier(MemoryTier):
        def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
            if next(loads) < meeting.parties:  # a check of the rest comes after
                meeting.wait(DEADLINE)
            return super().load(block_hashes)

    stack = TierManager([MeetingTier(LARGE)], namespace=NAMESPACE, queue_bytes=1, readers=3)
    outcome: Outcome = Future()
    stack.onboard(IDS, [BlockRun("ram", 3 * PIECE_BLOCKS, None)], outcome.set_result)
    assert outcome.result(DEADLINE) == [None] * 40
    assert not meeting.broken
    stack.close(DEADLINE)


def test_nothing_is_read_beyond_a_block_that_is_missing(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries([*BLOCKS[:3], *BLOCKS[4:]]))
    assert fetched(stack, BLOCKS, [BlockRun("gated", 40, None)])[:4] == [*BLOCKS[:3], None]
    assert tier.loads[0] == tuple(IDS[:PIECE_BLOCKS])
    assert tuple(IDS[PIECE_BLOCKS : 2 * PIECE_BLOCKS]) not in tier.loads  # only a check of the rest comes after


def test_a_cancelled_fetch_reads_no_further_and_tells_what_came(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries(BLOCKS))
    close_gate(tier)
    fetch, outcome = start(stack, BLOCKS)
    assert tier.began.wait(DEADLINE)
    fetch.cancel()
    tier.gate.set()
    assert outcome.result(DEADLINE) == [*BLOCKS[:PIECE_BLOCKS], *[None] * (40 - PIECE_BLOCKS)]
    assert len(tier.loads) == 1


def test_a_fetch_of_nothing_is_told(stack: TierManager) -> None:
    assert fetched(stack, BLOCKS, []) == [None] * 40
    assert fetched(stack, [], []) == []


def test_what_was_read_before_a_removal_is_not_stored_again_after_it() -> None:
    fast, slow = MemoryTier(LARGE), GatedTier()
    stack = TierManager([fast, slow], namespace=NAMESPACE, queue_bytes=LARGE)
    slow.store(entries(BLOCKS[:2]))
    close_gate(slow)
    _, outcome = start(stack, BLOCKS[:2])
    assert slow.began.wait(DEADLINE)
    removed = stack.remove(IDS[:2])
    assert {name: each.result(DEADLINE) for name, each in removed.items()} == {
        "ram": RemovalResult(),
        "gated": RemovalResult(2),
    }
    slow.gate.set()
    outcome.result(DEADLINE)
    assert stack.flush(DEADLINE)
    assert stack.find(IDS[:2]) == []
    stack.close(DEADLINE)


@pytest.fixture
def broken() -> BrokenTier:
    return BrokenTier()


@pytest.fixture
def shaky(broken: BrokenTier) -> Iterator[TierManager]:
    stack = TierManager([broken], namespace=NAMESPACE, queue_bytes=LARGE)
    yield stack
    stack.close(DEADLINE)


def test_a_store_that_raises_is_counted_and_the_next_one_goes_on(
    broken: BrokenTier, shaky: TierManager, caplog: pytest.LogCaptureFixture
) -> None:
    broken.broken = {"store"}
    shaky.offload([OffloadedBlock(each) for each in BLOCKS[:3]])
    assert shaky.flush(DEADLINE)
    broken.broken = set()
    shaky.offload([OffloadedBlock(each) for each in BLOCKS[:3]])
    assert shaky.flush(DEADLINE)
    failures = shaky.stack_stats().failures["ZeroDivisionError"]
    assert 1 <= failures <= 3  # batches
    assert shaky.stack_stats().queue_bytes == 0
    assert fetched(shaky, BLOCKS[:3]) == BLOCKS[:3]
    assert caplog.messages.count("broken tier: a change failed") == failures


def test_a_load_that_raises_is_a_miss_and_the_next_one_goes_on(broken: BrokenTier, shaky: TierManager) -> None:
    broken.store(entries(BLOCKS))
    broken.broken = {"load"}
    assert fetched(shaky, BLOCKS) == [None] * 40
    broken.broken = set()
    assert fetched(shaky, BLOCKS) == BLOCKS
    assert set(shaky.stack_stats().failures) == {"ZeroDivisionError"}


def refuse(found: list[BlockRecord | None]) -> None:
    raise IndexError(len(found))


def test_who_fails_to_take_its_blocks_does_not_stop_the_others(broken: BrokenTier, shaky: TierManager) -> None:
    broken.store(entries(BLOCKS))
    shaky.onboard(IDS, shaky.find(IDS), refuse)
    assert fetched(shaky, BLOCKS) == BLOCKS
    shaky.close(DEADLINE)
    assert shaky.stack_stats().failures == {"IndexError": 1}


def test_close_stores_what_is_queued(tier: GatedTier, stack: TierManager) -> None:
    close_gate(tier)
    stack.offload([OffloadedBlock(each) for each in BLOCKS[:5]])
    assert tier.began.wait(DEADLINE)
    closing: Future[bool] = Future()
    thread = threading.Thread(target=lambda: closing.set_result(stack.close(DEADLINE)))
    thread.start()
    tier.gate.set()
    assert closing.result(DEADLINE)
    thread.join(DEADLINE)
    assert tier.lookup(IDS[:5]) == 5
    assert tier.closed


def test_close_does_not_wait_longer_than_it_was_told(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries(BLOCKS))
    close_gate(tier)
    _, outcome = start(stack, BLOCKS)
    assert tier.began.wait(DEADLINE)
    stack.offload([OffloadedBlock(each) for each in OTHERS])
    assert not stack.close(0.01)
    assert outcome.result(0) == [None] * 40
    tier.gate.set()


def test_after_close_nothing_is_stored_and_a_fetch_is_told_at_once(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries(BLOCKS))
    assert stack.close(DEADLINE)
    assert stack.close(DEADLINE)
    stack.offload([OffloadedBlock(each) for each in OTHERS])
    stack.touch(IDS)
    for removal in (stack.remove(IDS), stack.clear()):
        assert removal["gated"].result(0) == RemovalResult(reason="closed")
    assert stack.flush(DEADLINE)
    assert stack.stack_stats().queue_full == len(OTHERS)
    _, outcome = start(stack, BLOCKS)
    assert outcome.result(0) == [None] * 40


def test_a_removal_cannot_be_cancelled_by_its_caller(tier: GatedTier, stack: TierManager) -> None:
    tier.store(entries(BLOCKS[:1]))
    close_gate(tier)
    stack.touch(IDS[:1])
    answer = stack.remove(IDS[:1])[tier.name]
    assert not answer.cancel()
    tier.gate.set()
    assert answer.result(DEADLINE) == RemovalResult(1)
    assert stack.flush(DEADLINE)


def test_close_ends_a_flush_of_what_it_drops() -> None:
    stack = TierManager([MemoryTier(LARGE)], namespace=NAMESPACE, queue_bytes=LARGE, start=False)
    stack.offload([OffloadedBlock(block) for block in BLOCKS])
    waiting = threading.Event()
    flushed: Future[bool] = Future()

    def flush() -> None:
        waiting.set()
        flushed.set_result(stack.flush(2 * DEADLINE))

    threading.Thread(target=flush, daemon=True).start()
    assert waiting.wait(DEADLINE)
    assert not stack.close(0.05)
    assert flushed.result(DEADLINE)
