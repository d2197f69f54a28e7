"""The remote tier over a real server: what processes find, limits that hold over all of them, and removals."""

from itertools import permutations
from pathlib import Path

import pytest

from emberkv.core.loading import LookupStatus
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import RemoteTierError
from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.manager import TierManager
from emberkv.tiers.remote.server import ServerAddress
from emberkv.tiers.remote.tier import NOT_REACHED, RemoteTier
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, records
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.tiers.remote_tier import BLOCKS, ENTRIES, IDS, LARGE, SIZE, comes_back, loaded, opened, refreshed
from tests.waiting import DEADLINE, eventually

pytestmark = needs_server


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
    before = reader.stats().errors
    with pytest.raises(RemoteTierError, match="not asked"):
        reader.scan(0)
    assert reader.stats().errors == before


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
    assert ours.clear() == RemovalResult(0, 0, NOT_REACHED)
    server.thaw()
    ours = opened(server, max_bytes=4 * SIZE)
    assert ours.store(ENTRIES[:3]).count == 3
    assert ours.stats().bytes == 4 * SIZE
    assert theirs.query(IDS) == 1
    assert ours.clear() == RemovalResult(3)
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


def test_a_removal_while_the_server_is_away_is_carried_out_when_it_is_back(server: RedisProcess) -> None:
    clock = Clock()
    tier, other = opened(server, clock=clock), opened(server)
    tier.store(ENTRIES[:3])
    server.freeze()
    assert tier.query(IDS) == 0
    assert tier.remove(IDS[:1]) == RemovalResult(0, 1, NOT_REACHED)
    assert tier.clear() == RemovalResult(0, 3, NOT_REACHED)
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
    assert (tier.stats().circuit, tier.stats().errors) == (Circuit.OPEN, {"no connection": 1})
