"""What the tiers store and lose reaches the readers of the cache's events, and their blocks can be exported."""

import pytest

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored
from emberkv.core.feed import EventBatch
from emberkv.core.hashing import BlockHash
from emberkv.engine.block_transfer import BlockTransfer
from emberkv.engine.commands import ReadEvents, ReadSnapshot, Remove
from emberkv.engine.tier_link import READ_SECONDS
from emberkv.tiers.codec import decode_record
from tests.engine.loop_harness import running
from tests.engine.tier_harness import NAMESPACE, TieredHarness
from tests.waiting import DEADLINE

PROMPT = range(2, 22)  # 20 tokens, 5 blocks of 4


def tier_events(harness: TieredHarness) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    batch = harness.loop.execute(ReadEvents(0)).result(DEADLINE)
    assert isinstance(batch, EventBatch)
    return [event for event in batch.events if event.tier == "ram"]


def test_what_a_tier_stores_and_removes_is_in_the_log_and_in_snapshots() -> None:
    hashes = tuple(TieredHarness().chain(PROMPT).block_hashes)
    with running(TieredHarness()) as harness:
        harness.ask("a", PROMPT, new=1)
        assert harness.stack.flush(DEADLINE)
        stored = [
            each for event in tier_events(harness) if isinstance(event, BlockStored) for each in event.block_hashes
        ]
        assert stored == list(hashes)
        chunk = harness.loop.execute(ReadSnapshot()).result(DEADLINE)
        assert (chunk.tier, chunk.block_hashes) == ("pool", hashes)
        chunk = harness.loop.execute(ReadSnapshot(chunk.next_cursor or "")).result(DEADLINE)
        assert (chunk.tier, set(chunk.block_hashes), chunk.next_cursor) == ("ram", set(hashes), None)
        harness.loop.execute(Remove(hashes[3:])).result(DEADLINE).tiers["ram"].result(DEADLINE)
        removed = tier_events(harness)[-1]
        assert isinstance(removed, BlockRemoved)
        assert (set(removed.block_hashes), removed.evicted) == (set(hashes[3:]), False)
        harness.loop.execute(Remove(None)).result(DEADLINE).tiers["ram"].result(DEADLINE)
        assert tier_events(harness)[-1] == AllBlocksCleared("ram")


def test_observers_get_what_a_tier_stores_after_the_last_step() -> None:
    harness = TieredHarness()
    stored: set[BlockHash] = set()
    hashes = set(harness.chain(PROMPT).block_hashes)
    harness.loop.on_update(
        lambda update: stored.update(
            each
            for event in update.events
            if isinstance(event, BlockStored) and event.tier == "ram"
            for each in event.block_hashes
        )
    )
    with running(harness):
        harness.ask("a", PROMPT, new=1)
        assert harness.stack.flush(DEADLINE)
        harness.loop.execute(ReadEvents(0)).result(DEADLINE)
        harness.loop.execute(ReadEvents(0)).result(DEADLINE)  # the step before it has published
    assert stored == hashes


def exporting() -> tuple[TieredHarness, BlockTransfer]:
    harness = TieredHarness()
    harness.stock(PROMPT)
    return harness, BlockTransfer(harness.scheduler.cache, harness.bytes, NAMESPACE, lower=harness.link)


def test_blocks_that_only_a_tier_has_are_exported() -> None:
    harness, transfer = exporting()
    chain = harness.chain([*PROMPT, 40, 41, 42, 43])
    answer = transfer.export(chain.block_hashes)
    while not answer.done():
        harness.link.completed()
    *records, last = answer.result()
    payloads = [decode_record(each, namespace=NAMESPACE).payload for each in records if each is not None]
    assert [bytes(each) for each in payloads] == chain.block_hashes[:5]
    assert last is None
    assert harness.pool.stats.exported_blocks == 5
    assert harness.stack.close(DEADLINE)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_export_does_not_wait_for_a_tier_that_is_stuck(stopped: bool) -> None:
    now = [0.0]
    harness = TieredHarness(clock=lambda: now[0])
    harness.stock(PROMPT)
    transfer = BlockTransfer(harness.scheduler.cache, harness.bytes, NAMESPACE, lower=harness.link)
    harness.tier.gate.clear()
    answer = transfer.export(harness.chain(PROMPT).block_hashes)
    assert harness.tier.entered.wait(DEADLINE)
    harness.link.completed()
    assert (answer.done(), harness.link.seconds_left) == (False, READ_SECONDS)
    if stopped:
        harness.link.close()
    else:
        now[0] = READ_SECONDS
        harness.link.completed()
    assert answer.result(0) == [None] * 5
    harness.tier.gate.set()
    assert harness.stack.close(DEADLINE)
    assert harness.link.completed() == []
