"""The remote tier and a real server that is killed, frozen, emptied, full, locked, or has lost some of its keys."""

import time
from pathlib import Path
from threading import Event

import pytest

from emberkv.core.loading import LookupStatus
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.remote.server import LONGEST_PAUSE, ServerAddress
from emberkv.tiers.remote.tier import LOOKUP_SECONDS, RemoteTier
from tests.tiers.build import NAMESPACE, OTHER, entry_of
from tests.tiers.build import checkpoint as checkpoint_of
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.tiers.remote_tier import BLOCKS, ENTRIES, IDS, LARGE, comes_back, loaded, opened, refreshed
from tests.waiting import DEADLINE, eventually

pytestmark = needs_server


def test_a_killed_server_is_left_alone_and_used_again_when_it_is_back(server: RedisProcess) -> None:
    clock = Clock()
    tier = opened(server, clock=clock)
    tier.store(ENTRIES[:2])
    server.kill()
    assert tier.query(IDS) == 0
    assert (tier.stats().circuit, tier.status(IDS[0])) == (Circuit.OPEN, LookupStatus.MISS)
    calls = tier.stats().errors
    assert (tier.query(IDS), tier.load(IDS[:1]), tier.store(ENTRIES[2:3]).count) == (0, [None], 0)
    tier.touch(IDS)
    tier.refresh()
    assert tier.stats().errors == calls == {"no connection": 1}
    assert tier.stats().skipped == {"server not available": 1}
    clock.now += LONGEST_PAUSE
    tier.refresh()
    assert (tier.stats().circuit, tier.stats().errors) == (Circuit.OPEN, {"no connection": 2})
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
    assert (tier.stats().circuit, tier.stats().errors) == (Circuit.OPEN, {"no answer in time": 1})
    assert tier.load(IDS[:2]) == [None, None]
    assert tier.stats().errors == {"no answer in time": 1}
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
    assert tier.stats().errors == {}


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
    assert (tier.stats().entries, tier.stats().bytes, tier.stats().errors) == (0, 0, {"index lost": 1})
    assert tier.store(ENTRIES[:3]).count == 3
    assert tier.query(IDS) == 3


def test_a_full_server_stores_nothing_and_serves_and_removes_what_it_has(server: RedisProcess) -> None:
    checkpoint = checkpoint_of(BLOCKS[0], 3)
    tier, other = opened(server), opened(server)
    tier.store([*ENTRIES[:2], entry_of(checkpoint)])
    other.refresh()
    server.client().config_set("maxmemory", 1)
    assert tier.store(ENTRIES[2:3]).count == 0
    stats = tier.stats()
    assert (stats.skipped, stats.errors) == ({"server out of memory": 1}, {"server out of memory": 1})
    assert (tier.load(IDS[:2]), stats.circuit) == (ENTRIES[:2], Circuit.CLOSED)
    tier.touch(IDS[:1])
    started = opened(server)
    assert [each.partial_counts(IDS[0]) for each in (started, other)] == [[3], [3]]
    assert tier.remove(IDS[:1]) == RemovalResult(1)
    for each in (started, other):
        assert refreshed(each).errors == {}
        assert (each.partial_counts(IDS[0]), each.was_emptied()) == ([], False)
    assert tier.clear() == RemovalResult(1)
    assert [(refreshed(each).errors, each.was_emptied()) for each in (started, other)] == [({}, True)] * 2
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
