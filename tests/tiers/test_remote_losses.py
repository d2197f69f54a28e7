"""Blocks that a remote tier has lost, by time, eviction, or a server that was emptied: each process learns of them."""

from dataclasses import replace
from queue import SimpleQueue

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored
from emberkv.core.events import Event as CacheEvent
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.remote.tier import RemoteTier
from tests.tiers.build import NAMESPACE, OTHER, entries
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.tiers.remote_tier import BLOCKS, ENTRIES, IDS, LARGE, SIZE, comes_back, opened
from tests.waiting import DEADLINE, eventually

pytestmark = needs_server


def test_a_server_that_was_flushed_is_noticed_once_by_each_process_that_knew_its_blocks(server: RedisProcess) -> None:
    first, second, other = opened(server), opened(server), opened(server, prefix=b"other:")
    first.store(ENTRIES[:3])
    for tier in (first, second, other):
        tier.refresh()
        assert not tier.was_emptied()
    server.client().flushall()
    for tier, emptied in ((first, True), (second, True), (other, False)):
        tier.refresh()
        tier.refresh()
        assert [tier.was_emptied(), tier.was_emptied()] == [emptied, False]


def test_an_event_says_that_a_server_was_flushed(server: RedisProcess) -> None:
    events: SimpleQueue[CacheEvent] = SimpleQueue()
    manager = TierManager([opened(server)], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.on_event = events.put
    manager.offload([OffloadedBlock(record) for record in BLOCKS[:2]])
    try:
        assert isinstance(events.get(timeout=DEADLINE), BlockStored)
        server.client().flushall()
        assert events.get(timeout=DEADLINE) == AllBlocksCleared("remote")
    finally:
        manager.close(0.0)


def lost(*tiers: RemoteTier) -> list[bytes]:
    """What refreshes of these find gone, sorted."""
    for tier in tiers:
        tier.refresh()
    return sorted(each for tier in tiers for each in tier.lost_blocks())


def test_each_process_learns_of_the_blocks_that_have_expired(server: RedisProcess) -> None:
    writer, reader = opened(server, ttl_seconds=0.05), opened(server)
    writer.store(ENTRIES[:3])
    found: dict[RemoteTier, list[bytes]] = {writer: [], reader: []}

    def all_found() -> bool:
        for tier in found:
            found[tier] += lost(tier)
        return all(len(each) >= 3 for each in found.values())

    eventually(all_found)
    assert [sorted(each) for each in found.values()] == [sorted(IDS[:3])] * 2
    assert [lost(writer), lost(reader)] == [[], []]


def test_one_look_forgets_no_more_blocks_of_several_owners_than_a_process_reads_at_once(server: RedisProcess) -> None:
    tier, lost_at_once, each = opened(server, ttl_seconds=0.05), [], 800
    tier.store(
        [
            replace(ENTRIES[0], block_hash=number.to_bytes(32), owner=owner)
            for owner, first in (("ann", 0), ("bob", each))
            for number in range(first, first + each)
        ]
    )

    def all_found() -> bool:
        lost_at_once.append(len(lost(tier)))
        return sum(lost_at_once) == 2 * each

    eventually(all_found)
    assert max(lost_at_once) <= 1000


def test_a_process_with_a_shorter_time_to_live_leaves_the_blocks_of_others(
    server: RedisProcess,
) -> None:
    long, short = opened(server), opened(server, ttl_seconds=0.001)
    long.store(ENTRIES[:3])
    short.store([*ENTRIES[:1], *ENTRIES[3:5]])
    assert short.load(IDS[1:2]) == ENTRIES[1:2]
    found: list[bytes] = []

    def both_found() -> bool:
        found.extend(lost(long))
        short.refresh()
        return len(found) >= 2

    eventually(both_found)
    assert (sorted(found), long.query(IDS)) == (sorted(IDS[3:5]), 3)


def taken_by_others(server: RedisProcess) -> None:
    """A process with another model stores two blocks, for which two others are evicted."""
    theirs = RemoteTier(server.address, 2 * SIZE, namespace=OTHER).connect()
    assert theirs.store(entries(BLOCKS[:2], namespace=OTHER)).evicted == []
    assert lost(theirs) == []


def test_each_process_learns_of_blocks_that_one_with_another_model_has_evicted(server: RedisProcess) -> None:
    ours, others = opened(server), opened(server)
    ours.store(ENTRIES[:2])
    taken_by_others(server)
    for tier in (ours, others):
        assert (lost(tier), lost(tier)) == (sorted(IDS[:2]), [])


def test_losses_are_told_again_where_the_answer_was_lost(server: RedisProcess) -> None:
    clock = Clock()
    tier = opened(server, clock=clock)
    tier.store(ENTRIES[:2])
    taken_by_others(server)
    server.freeze()
    assert lost(tier) == []
    server.thaw()
    comes_back(tier, clock)
    assert lost(tier) == sorted(IDS[:2])


def test_what_was_lost_before_a_process_has_connected_is_not_told(server: RedisProcess) -> None:
    opened(server).store(ENTRIES[:2])
    taken_by_others(server)
    late = opened(server)
    late.store(ENTRIES[:2])
    assert lost(late) == []


def test_a_process_learns_of_records_that_the_server_took_away_when_they_are_missed(server: RedisProcess) -> None:
    tier, client = opened(server), server.client()
    tier.store(ENTRIES[:3])
    client.delete(*client.keys(b"*:b:*" + IDS[1]))
    assert lost(tier) == []
    assert tier.load(IDS[:3]) == [ENTRIES[0], None, ENTRIES[2]]
    assert lost(tier) == [IDS[1]]


def test_a_lost_block_that_is_stored_again_is_not_reported(server: RedisProcess) -> None:
    ours = opened(server)
    theirs = RemoteTier(server.address, 2 * SIZE, namespace=OTHER).connect()
    ours.store(ENTRIES[:2])
    theirs.store(entries(BLOCKS[:2], namespace=OTHER))
    ours.store(ENTRIES[1:2])
    assert lost(ours) == [IDS[0]]


def test_an_event_says_which_blocks_have_expired(server: RedisProcess) -> None:
    events: SimpleQueue[CacheEvent] = SimpleQueue()
    manager = TierManager([opened(server, ttl_seconds=0.05)], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.on_event = events.put
    manager.offload([OffloadedBlock(record) for record in BLOCKS[:1]])
    try:
        assert isinstance(events.get(timeout=DEADLINE), BlockStored)
        reported = [events.get(timeout=DEADLINE) for _ in range(2)]
        assert BlockRemoved((IDS[0],), tier="remote") in reported
    finally:
        manager.close(0.0)
