"""The remote tier and a real server that is killed, frozen, emptied, full, locked or lies."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import pytest

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored
from emberkv.core.events import Event as CacheEvent
from emberkv.core.loading import LookupStatus
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError, RemoteTierError
from emberkv.tiers.base import Removed, TierEntry
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.remote.server import LONGEST_PAUSE, PREFIX, ServerAddress
from emberkv.tiers.remote.tier import ENTRY_BYTES, LOOKUP_SECONDS, NOT_REACHED, RemoteTier
from emberkv.tiers.stats import TierStats
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, records
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.waiting import DEADLINE, eventually

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
LARGE = 10_000_000
SIZE = len(ENTRIES[0].data) + ENTRY_BYTES

pytestmark = needs_server


@pytest.fixture
def server(redis_server: RedisProcess) -> Iterator[RedisProcess]:
    """For a test that may do it harm; afterwards it runs, empty."""
    redis_server.client().flushall()
    yield redis_server
    redis_server.thaw()
    if not redis_server.answers():
        redis_server.start()
    redis_server.client().config_set("maxmemory", 0)
    redis_server.client().flushall()


def opened(
    server: RedisProcess,
    *,
    max_bytes: int = LARGE,
    ttl_seconds: float = 1000.0,
    shares: Mapping[str, Share] | None = None,
    prefix: bytes = PREFIX,
    clock: Callable[[], float] | None = None,
) -> RemoteTier:
    return RemoteTier(
        server.address, max_bytes, namespace=NAMESPACE, ttl_seconds=ttl_seconds, shares=shares, prefix=prefix,
        clock=clock or Clock(),
    ).connect()  # fmt: skip


def comes_back(tier: RemoteTier, clock: Clock) -> None:
    """Probe until the server answers, with time that passes as fast as it is asked for."""

    def answers() -> bool:
        if tier.stats().circuit is not Circuit.CLOSED:
            clock.now += LONGEST_PAUSE
            tier.refresh()
        return tier.stats().circuit is Circuit.CLOSED

    eventually(answers)


def refreshed(tier: RemoteTier) -> TierStats:
    tier.refresh()
    return tier.stats()


def test_what_one_process_stores_another_finds(server: RedisProcess) -> None:
    first, second = opened(server), opened(server)
    assert first.store(ENTRIES[:4]).count == 4
    assert second.status(IDS[0]) is LookupStatus.PENDING
    assert second.query(IDS) == 4
    assert second.load(IDS[:5]) == [*ENTRIES[:4], None]
    assert second.stats().bytes == first.stats().bytes == 4 * SIZE


def test_a_process_reads_which_blocks_others_have_stored(server: RedisProcess) -> None:
    many = records(2000, seed=7)
    opened(server).store(entries(many))
    RemoteTier(server.address, LARGE, namespace=OTHER).connect().store(entries(BLOCKS, namespace=OTHER))
    reader, found, cursors = opened(server), set[bytes](), list[int | None]([0])
    while (cursor := cursors[-1]) is not None:
        some, following = reader.scan(cursor)
        found.update(some)
        cursors.append(following)
    assert found == set(block_hashes(many))
    assert len(cursors) > 2
    server.kill()
    with pytest.raises(RemoteTierError, match="no connection"):
        reader.scan(0)
    before = reader.stats().troubles
    with pytest.raises(RemoteTierError, match="not asked"):
        reader.scan(0)
    assert reader.stats().troubles == before


def test_records_that_are_there_are_not_sent_again(server: RedisProcess) -> None:
    first, second = opened(server), opened(server)
    large = TierEntry(IDS[0], "", b"x" * 100_000)
    assert first.store([large]).count == 1
    before = int(server.client().info("stats")["total_net_input_bytes"])
    assert second.store([large]).count == 1
    assert int(server.client().info("stats")["total_net_input_bytes"]) - before < 10_000


def test_other_namespaces_are_not_found_and_count_towards_the_size(server: RedisProcess) -> None:
    ours = opened(server, max_bytes=4 * SIZE)
    theirs = RemoteTier(server.address, 4 * SIZE, namespace=OTHER).connect()
    theirs.store(entries(BLOCKS[:4], namespace=OTHER))
    assert ours.query(IDS) == 0
    server.freeze()
    assert ours.remove(IDS[:1]).kept == 1  # which finds out that the server is away
    assert ours.clear() == Removed(0, 0, NOT_REACHED)
    server.thaw()
    ours = opened(server, max_bytes=4 * SIZE)
    assert ours.store(ENTRIES[:3]).count == 3
    assert ours.stats().bytes == 4 * SIZE
    assert theirs.query(IDS) == 1
    assert ours.clear() == Removed(3)
    assert theirs.query(IDS) == 1


def test_the_size_holds_over_several_writers_and_the_least_recently_used_goes(server: RedisProcess) -> None:
    tiers = [opened(server, max_bytes=3 * SIZE) for _ in range(3)]
    for index, tier in enumerate(tiers):
        assert tier.store([ENTRIES[index]]).count == 1
    tiers[2].load(IDS[:1])
    assert tiers[1].store([ENTRIES[3]]).evicted == [IDS[1]]
    assert [tiers[0].query([each]) for each in IDS[:4]] == [1, 0, 1, 1]
    assert tiers[1].stats().bytes == 3 * SIZE
    assert len(server.client().keys(b"emberkv:1:b:*")) == 3


def test_floors_and_quotas_hold_over_several_writers(server: RedisProcess) -> None:
    shares = {"quiet": Share(2 * SIZE), "small": Share(0, SIZE)}
    tiers = [opened(server, max_bytes=4 * SIZE, shares=shares) for _ in range(2)]
    tiers[0].store(entries(BLOCKS[:2], owner="quiet"))
    for block in BLOCKS[2:]:
        tiers[1].store(entries([block], owner="flood"))
    assert tiers[0].query(IDS[:2]) == 2
    tiers[1].store(entries(records(3, seed=9), owner="small"))
    tiers[0].refresh()
    assert tiers[0].stats().bytes_by_owner == {"quiet": 2 * SIZE, "flood": SIZE, "small": SIZE}


def test_a_block_that_is_not_used_for_its_time_to_live_is_gone(server: RedisProcess) -> None:
    tier = opened(server, ttl_seconds=0.05)
    tier.store(ENTRIES[:2])
    eventually(lambda: not refreshed(tier).entries)
    assert (tier.load(IDS[:2]), tier.stats().bytes) == ([None, None], 0)
    assert server.client().keys(b"*:b:*") == []


def test_a_killed_server_is_left_alone_and_used_again_when_it_is_back(server: RedisProcess) -> None:
    clock = Clock()
    tier = opened(server, clock=clock)
    tier.store(ENTRIES[:2])
    server.kill()
    assert tier.query(IDS) == 0
    assert (tier.stats().circuit, tier.status(IDS[0])) == (Circuit.OPEN, LookupStatus.MISS)
    calls = tier.stats().troubles
    assert (tier.query(IDS), tier.load(IDS[:1]), tier.store(ENTRIES[2:3]).count) == (0, [None], 0)
    tier.touch(IDS)
    tier.refresh()
    assert tier.stats().troubles == calls == {"no connection": 1}
    assert tier.stats().skipped == {"server not available": 1}
    clock.now += LONGEST_PAUSE
    tier.refresh()
    assert (tier.stats().circuit, tier.stats().troubles) == (Circuit.OPEN, {"no connection": 2})
    server.start()
    comes_back(tier, clock)
    assert tier.query(IDS) == 0
    assert tier.store(ENTRIES[:2]).count == 2
    assert tier.load(IDS[:2]) == ENTRIES[:2]


def test_a_frozen_server_costs_one_call_its_time_and_is_used_again(server: RedisProcess) -> None:
    clock = Clock()
    tier = opened(server, clock=clock)
    tier.store(ENTRIES[:2])
    server.freeze()
    assert tier.load(IDS[:2]) == [None, None]
    assert (tier.stats().circuit, tier.stats().troubles) == (Circuit.OPEN, {"no answer in time": 1})
    assert tier.load(IDS[:2]) == [None, None]
    assert tier.stats().troubles == {"no answer in time": 1}
    server.thaw()
    comes_back(tier, clock)
    assert tier.load(IDS[:2]) == ENTRIES[:2]


def test_a_query_of_a_frozen_server_is_answered_as_a_miss_and_the_tier_used_again_later(server: RedisProcess) -> None:
    tier = opened(server, clock=time.monotonic)
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.offload([OffloadedBlock(block) for block in BLOCKS])
    assert manager.flush(DEADLINE)
    server.freeze()
    done = Event()
    assert manager.ask(IDS, done.set).seconds == LOOKUP_SECONDS
    assert done.wait(DEADLINE)
    assert (manager.find(IDS), manager.status(IDS[0])) == ([], LookupStatus.MISS)
    server.thaw()
    eventually(lambda: loaded(manager) == BLOCKS[:1])
    assert manager.close(DEADLINE)


def test_an_emptied_server_has_nothing_and_takes_blocks_again(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(ENTRIES[:3])
    server.client().flushall()
    assert (tier.query(IDS), tier.load(IDS[:1])) == (0, [None])
    tier.refresh()
    assert (tier.stats().entries, tier.stats().bytes) == (0, 0)
    assert tier.store(ENTRIES[:2]).count == 2
    assert (tier.query(IDS), tier.stats().circuit) == (2, Circuit.CLOSED)


def test_a_server_is_known_by_what_it_keeps_whatever_it_is_called(server: RedisProcess, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(server.socket.parent)

    def known(url: str, namespace: bytes = NAMESPACE) -> bytes | None:
        return RemoteTier(ServerAddress(url), LARGE, namespace=namespace).connect().store_id

    first = known(server.address.url)
    assert first == known(f"unix://{tmp_path}/link/{server.socket.name}") is not None
    others = [
        known(f"{server.address.url}?db=1"),
        known(server.address.url, OTHER),
        opened(server, prefix=b"x").store_id,
    ]
    with RedisProcess(tmp_path / "other") as other:
        others.append(known(other.address.url))
    assert len({first, None, *others}) == 6


def test_processes_agree_that_a_server_is_another_one_when_it_has_lost_all(server: RedisProcess) -> None:
    tiers = opened(server), opened(server)
    before = tiers[0].store_id
    server.kill()
    server.start()
    for tier in tiers:
        tier.refresh()
    assert tiers[0].store_id == tiers[1].store_id not in (before, None)


def test_a_server_that_does_not_know_the_script_is_given_it(server: RedisProcess) -> None:
    tier = opened(server)
    server.client().script_flush()
    assert tier.store(ENTRIES[:1]).count == 1
    assert tier.stats().troubles == {}


def test_records_that_the_server_took_away_are_missing_and_stored_again(server: RedisProcess) -> None:
    tier, client = opened(server), server.client()
    tier.store(ENTRIES[:2])
    for key in client.keys(b"*:b:*"):
        client.delete(key)
    assert tier.load(IDS[:2]) == [None, None]
    assert (tier.query(IDS), tier.stats().bytes) == (0, 0)
    assert tier.store(ENTRIES[:2]).count == 2
    assert tier.load(IDS[:2]) == ENTRIES[:2]


def test_an_index_that_the_server_took_a_part_of_is_begun_anew(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(ENTRIES[:3])
    server.client().delete(b"emberkv:1:lru:")
    eventually(lambda: not refreshed(tier).entries)
    assert (tier.stats().entries, tier.stats().bytes, tier.stats().troubles) == (0, 0, {"index lost": 1})
    assert tier.store(ENTRIES[:3]).count == 3
    assert tier.query(IDS) == 3


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
        told = [events.get(timeout=DEADLINE) for _ in range(2)]
        assert BlockRemoved((IDS[0],), tier="remote") in told
    finally:
        manager.close(0.0)


def test_a_full_server_stores_nothing_and_serves_and_removes_what_it_has(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(ENTRIES[:2])
    server.client().config_set("maxmemory", 1)
    assert tier.store(ENTRIES[2:3]).count == 0
    stats = tier.stats()
    assert (stats.skipped, stats.troubles) == ({"server out of memory": 1}, {"server out of memory": 1})
    assert (tier.load(IDS[:2]), stats.circuit) == (ENTRIES[:2], Circuit.CLOSED)
    tier.touch(IDS[:1])
    assert tier.remove(IDS[:1]) == Removed(1)
    assert tier.clear() == Removed(1)
    server.client().config_set("maxmemory", 0)
    assert tier.store(ENTRIES[2:3]).count == 1


def test_a_wrong_password_is_refused_at_the_start_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisProcess(tmp_path / "redis", "--requirepass", "the right one") as server:
        for password in ("the wrong one", None):
            address = ServerAddress(server.address.url, password)
            with pytest.raises(ConfigError, match="refuses access; check the user in the URL") as raised:
                RemoteTier(address, LARGE, namespace=NAMESPACE).connect()
            shown = f"{raised.value} {address} {address!r} {caplog.text}"
            assert "the wrong one" not in shown
        tier = RemoteTier(ServerAddress(server.address.url, "the right one"), LARGE, namespace=NAMESPACE).connect()
        assert tier.store(ENTRIES[:1]).count == 1


def test_a_server_that_does_not_answer_at_the_start_is_used_when_it_does(server: RedisProcess) -> None:
    server.kill()
    clock = Clock()
    tier = opened(server, clock=clock)
    assert (tier.stats().circuit, tier.store_id) == (Circuit.OPEN, None)
    server.start()
    comes_back(tier, clock)
    assert tier.store(ENTRIES[:1]).count == 1
    assert tier.store_id == opened(server).store_id is not None


@pytest.mark.parametrize(
    "damage", [b"", b"x", b"x" * 2000, ENTRIES[1].data, entries(BLOCKS[:1], namespace=OTHER)[0].data]
)
def test_a_damaged_record_is_refused_removed_and_stored_again(server: RedisProcess, damage: bytes) -> None:
    tier = opened(server)
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    tier.store(ENTRIES[:1])
    seen = tier.removals_seen
    (key,) = server.client().keys(b"*:b:*")
    server.client().set(key, damage)
    assert loaded(manager) == [None]
    assert manager.flush(DEADLINE)
    assert sum(manager.stats()["remote"].corrupt.values()) == 1
    assert tier.query(IDS) == 0
    assert tier.store(ENTRIES[:1], seen=seen).count == 1  # a good copy, made before the damaged one was found
    assert loaded(manager) == BLOCKS[:1]
    assert manager.close(DEADLINE)


def loaded(manager: TierManager) -> list[object]:
    asked, read = Event(), Event()
    found: list[object] = []
    manager.ask(IDS[:1], asked.set)
    assert asked.wait(DEADLINE)
    manager.onboard(IDS[:1], manager.find(IDS[:1]), lambda records: (found.extend(records), read.set()))
    assert read.wait(DEADLINE)
    return found


def test_a_removal_while_the_server_is_away_is_carried_out_when_it_is_back(server: RedisProcess) -> None:
    clock = Clock()
    tier, other = opened(server, clock=clock), opened(server)
    tier.store(ENTRIES[:3])
    server.freeze()
    assert tier.query(IDS) == 0
    assert tier.remove(IDS[:1]) == Removed(0, 1, NOT_REACHED)
    assert tier.clear() == Removed(0, 3, NOT_REACHED)
    server.thaw()
    assert other.query(IDS) == 3
    comes_back(tier, clock)
    assert (tier.query(IDS), other.query(IDS), other.query(IDS[1:])) == (0, 0, 0)
    assert tier.store(ENTRIES[:1]).count == 1
    assert other.query(IDS) == 1


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("order", sorted(set(permutations("sscr"))))
def test_a_removal_is_final_at_every_order_of_stores_looks_and_removals(
    redis_server: RedisProcess, tmp_path: Path, order: tuple[str, ...], everything: bool
) -> None:
    """s: a process stores what it made before; c: it learns what the server knows; r: another one removes."""
    writer, remover = (opened(redis_server, prefix=f"{tmp_path}:".encode()) for _ in range(2))
    seen = writer.removals_seen
    removed = there = False
    for step in order:
        if step == "s":
            stored = writer.store(ENTRIES[:1], seen=seen).count == 1
            assert stored is not removed
            there = stored
        elif step == "c":
            writer.refresh()
        else:
            count = remover.clear().count if everything else remover.remove(IDS[:1]).count
            assert count == there
            removed, there = True, False
        assert remover.query(IDS) == there
    assert (writer.stats().skipped == {}) is (order[-1] == "r" or "s" not in order[order.index("r") :])
    writer.refresh()
    assert writer.store(ENTRIES[:1]).count == 1, "what is made after the removal is a new block"


def test_removals_beyond_those_remembered_refuse_what_is_older_than_all_of_them(
    redis_server: RedisProcess, tmp_path: Path
) -> None:
    writer, remover = (opened(redis_server, prefix=f"{tmp_path}:".encode()) for _ in range(2))
    remover.refresh()
    writer.refresh()
    seen = writer.removals_seen
    remover.remove(IDS[:1])
    for number in range(3):
        remover.remove([f"{number}/{index}".encode().ljust(32) for index in range(4000)])
    assert writer.store(ENTRIES[:2], seen=seen).count == 0
    assert writer.stats().skipped == {"removed meanwhile": 2}
    assert writer.store(ENTRIES[:2]).count == 2


@pytest.mark.parametrize("url", ["redis://localhost:1", "rediss://localhost:1/0", "unix:///nowhere/redis"])
def test_every_form_of_address_is_tried(url: str) -> None:
    tier = RemoteTier(ServerAddress(url), LARGE, namespace=NAMESPACE, clock=Clock()).connect()
    assert (tier.stats().circuit, tier.stats().troubles) == (Circuit.OPEN, {"no connection": 1})
