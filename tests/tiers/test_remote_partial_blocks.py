"""Partial blocks in the remote tier over a real server: each process knows which there are, and removals are final."""

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import pytest

from emberkv.core.hashing import partial_siblings_hash
from emberkv.core.loading import BlockRun, StoredPartial
from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.remote.server import PREFIX, BlockServer
from emberkv.tiers.remote.tier import ENTRY_BYTES, NOT_REACHED, PARTIAL_BYTES, RemoteTier
from tests.tiers.build import NAMESPACE, checkpoint, entry_of, fetched
from tests.tiers.harness import Clock
from tests.tiers.redis_process import RedisProcess, needs_server
from tests.tiers.remote_tier import BLOCKS, ENTRIES, IDS, LARGE, SIZE, comes_back, limit, opened, refreshed
from tests.waiting import DEADLINE, eventually

pytestmark = needs_server

SPACE = sha256(NAMESPACE).digest()[:16]
SHORT, LONG = checkpoint(BLOCKS[0], 2), checkpoint(BLOCKS[0], 3)
PRIVATE = OffloadedBlock(
    checkpoint(BLOCKS[0], 3, salt=b"ann").record, "ann", checkpoint(BLOCKS[0], 3, salt=b"ann").partial
)
ALL = [SHORT, LONG, PRIVATE]
PARENTS = [IDS[0], PRIVATE.record.parent]


def hash_of(block: OffloadedBlock) -> bytes:
    return block.record.block_hash


def stored(blocks: Iterable[OffloadedBlock] = ALL) -> list[TierEntry]:
    return [ENTRIES[0], *map(entry_of, blocks)]


def there(tier: RemoteTier) -> list[bool]:
    """Which of `ALL` the server gives."""
    return [entry is not None for entry in tier.load([hash_of(each) for each in ALL])]


def counts(tier: RemoteTier) -> list[list[int]]:
    return [sorted(tier.partial_counts(parent)) for parent in PARENTS]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call from now on that reads the index, of which there may be 20, whether it is read anew."""
    calls: list[bool] = []
    call = BlockServer.call

    def watched(self: BlockServer, operation: str, *arguments: object) -> Any:
        answer = call(self, operation, *arguments)
        if operation == "partial":
            calls.append(bool(answer[0]))
            assert len(calls) <= 20, "it reads the index without an end"
        return answer

    monkeypatch.setattr(BlockServer, "call", watched)
    return calls


def test_what_one_process_stores_another_finds_without_a_look_up(server: RedisProcess) -> None:
    first, second = opened(server), opened(server)
    assert first.store(stored()).count == 4
    assert (counts(first), counts(second)) == ([[2, 3], [3]], [[], []])
    second.refresh()
    third = opened(server)
    for tier in (second, third):
        assert counts(tier) == [[2, 3], [3]]
        assert tier.lookup([hash_of(LONG), hash_of(SHORT), IDS[0]], exact=True) == 2
        assert tier.load([hash_of(each) for each in ALL]) == [entry_of(each) for each in ALL]
        assert [tier.partial_place(hash_of(each)) for each in ALL] == [each.partial for each in ALL]
        assert [tier.partial_owner(hash_of(each)) for each in (SHORT, PRIVATE)] == ["", "ann"]
        assert tier.scan(0) == ([IDS[0]], None)
    assert third.stats().bytes == SIZE + sum(len(entry_of(each).data) + ENTRY_BYTES + PARTIAL_BYTES for each in ALL)
    manager = TierManager([third], namespace=NAMESPACE, queue_bytes=LARGE, start=False)
    found = manager.find_partial(IDS[0], lambda: LONG.record.tokens, range(1, 4))
    assert found == StoredPartial("remote", hash_of(LONG), 3, None)


def test_a_process_that_follows_takes_in_changes_alone(server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = opened(server), opened(server)
    writer.store(stored([SHORT]))
    reader.refresh()
    known = int(server.client().info("commandstats")["cmdstat_zrangebyscore"]["calls"])
    reader.refresh()
    assert int(server.client().info("commandstats")["cmdstat_zrangebyscore"]["calls"]) - known <= 2, "of losses alone"
    writer.store(stored([LONG]))
    writer.remove([hash_of(SHORT)])
    calls = watch(monkeypatch)
    reader.refresh()
    assert (counts(reader), calls) == ([[3], []], [False])


def test_a_process_that_is_too_far_behind_reads_all_anew(server: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server remembers the last ones that are gone, and up to which number it does not."""
    limit(monkeypatch, REMEMBERED_LOSSES=1)
    writer, reader = opened(server), opened(server)
    writer.store(stored())
    reader.refresh()
    writer.remove([hash_of(SHORT), hash_of(LONG)])
    assert server.client().zcard(PREFIX + b"gone:" + SPACE) == 1
    reader.refresh()
    assert counts(reader) == [[], [3]]


@pytest.mark.parametrize("is_followed", [False, True], ids=["none since", "one since"])
def test_a_process_learns_of_ends_that_the_server_has_forgotten_all_of(server: RedisProcess, is_followed: bool) -> None:
    """They expire together, or the server takes them away."""
    writer, reader = opened(server), opened(server)
    writer.store(stored())
    reader.refresh()
    writer.remove([hash_of(SHORT)])
    server.client().delete(PREFIX + b"gone:" + SPACE)
    if is_followed:
        writer.remove([hash_of(PRIVATE)])
    reader.refresh()
    assert counts(reader) == [[3], [] if is_followed else [3]]


def test_all_are_read_where_more_have_ended_since_than_the_server_remembers(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of one reading have numbers below those that are forgotten."""
    limit(monkeypatch, REMEMBERED_LOSSES=4, REPORTED_AT_ONCE=2)
    writer = opened(server)
    live, ended = ([checkpoint(block, count, payload_bytes=1) for count in range(1, 7)] for block in BLOCKS[:2])
    writer.store([*map(entry_of, live), *map(entry_of, ended)])
    writer.remove([hash_of(each) for each in ended])
    calls = watch(monkeypatch)
    reader = opened(server)
    assert [sorted(reader.partial_counts(each)) for each in IDS[:2]] == [[1, 2, 3, 4, 5, 6], []]
    assert calls == [True, False, False, False], "the last one finds no more, and none gives what ended before"
    writer.store([entry_of(SHORT)])
    assert sorted(writer.partial_counts(IDS[0])) == [1, 2, 3, 4, 5, 6]


def test_all_are_read_however_many_there_are(server: RedisProcess) -> None:
    many = [checkpoint(block, count, payload_bytes=1) for block in BLOCKS for count in range(1, 401)]
    opened(server).store([entry_of(each) for each in many])
    reader = opened(server)
    assert [len(reader.partial_counts(block)) for block in IDS] == [400] * len(BLOCKS)


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize(
    ("named", "left", "full"),
    [
        (IDS[0], [], 1),
        (partial_siblings_hash(IDS[0]), [PRIVATE], 0),
        (partial_siblings_hash(PRIVATE.record.parent), [SHORT, LONG], 0),
        (hash_of(LONG), [SHORT, PRIVATE], 0),
        (IDS[1], ALL, 0),
    ],
    ids=["the block before", "its parent", "its salted parent", "itself", "another block"],
)
def test_a_removal_takes_along_what_it_names_and_refuses_older_stores(
    server: RedisProcess, named: bytes, left: list[OffloadedBlock], full: int, is_known: bool
) -> None:
    """Whether or not the process that removes has heard of them."""
    writer, remover = opened(server), opened(server)
    writer.store(stored())
    seen = writer.removals_seen
    if is_known:
        remover.refresh()
    assert remover.remove([named]) == RemovalResult(full)
    assert [each for each in ALL if remover.lookup([hash_of(each)])] == (left if is_known else [])
    assert there(writer) == [each in left for each in ALL]
    writer.refresh()
    assert [each for each in ALL if writer.lookup([hash_of(each)])] == left
    assert writer.store([entry_of(each) for each in ALL], seen=seen).count == len(left)
    assert writer.stats().skipped == ({"removed meanwhile": 3 - len(left)} if left != ALL else {})
    assert writer.store([entry_of(each) for each in ALL]).count == 3
    assert [len(each) for each in counts(writer)] == [2, 1]


def test_what_is_cleared_is_gone_and_what_is_stored_then_is_found(server: RedisProcess) -> None:
    first, second = opened(server), opened(server)
    first.store(stored())
    second.refresh()
    assert second.clear() == RemovalResult(1)
    assert (counts(second), there(first), server.client().keys(b"*named:*")) == ([[], []], [False] * 3, [])
    first.refresh()
    first.store(stored([LONG]))
    second.refresh()
    assert (counts(first), counts(second)) == ([[3], []], [[3], []])


def test_one_whose_index_lacks_a_part_is_not_served(server: RedisProcess) -> None:
    """A removal would not find it."""
    tier = opened(server)
    tier.store(stored())
    server.client().delete(PREFIX + b"named:" + SPACE + partial_siblings_hash(IDS[0]))
    assert there(tier) == [False, False, True]
    tier.refresh()
    assert counts(tier) == [[], [3]]


def test_one_is_not_served_behind_a_block_that_an_earlier_version_has_removed(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(stored())
    server.client().zadd(PREFIX + b"removed", {SPACE + IDS[0]: tier.removals_seen + 1})
    assert there(tier) == [False] * 3
    tier.refresh()
    assert counts(tier) == [[], []]


def test_one_is_evicted_in_its_turn_and_no_event_tells_of_it(server: RedisProcess) -> None:
    size = len(entry_of(LONG).data) + ENTRY_BYTES + PARTIAL_BYTES
    tier, other = opened(server, max_bytes=size + SIZE), opened(server)
    assert tier.store([entry_of(LONG)]).evicted == []
    other.refresh()
    assert tier.store(ENTRIES[:2]).evicted == []
    assert tier.stats().evictions == 1
    assert (refreshed(tier).entries, counts(tier), other.lost_blocks()) == (2, [[], []], [])
    other.refresh()
    assert counts(other) == [[], []]


def test_one_that_is_not_used_for_its_time_to_live_is_gone_and_is_no_loss_of_a_block(server: RedisProcess) -> None:
    tier = opened(server, ttl_seconds=0.05)
    tier.store([entry_of(LONG)])
    eventually(lambda: not refreshed(tier).entries)
    assert (counts(tier), tier.lost_blocks()) == ([[], []], [])
    assert server.client().keys(b"*named:*") == []


def test_a_server_that_was_emptied_has_none(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(stored())
    server.client().flushall()
    tier.refresh()
    assert counts(tier) == [[], []]
    tier.store(stored([LONG]))
    assert counts(tier) == [[3], []]


def test_where_a_part_of_the_index_is_gone_all_of_these_are(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(stored())
    server.client().delete(PREFIX + b"lru:ann")
    eventually(lambda: not refreshed(tier).entries)
    assert (counts(tier), there(tier), server.client().keys(b"*named:*")) == ([[], []], [False] * 3, [])
    tier.store(stored())
    assert counts(tier) == [[2, 3], [3]]


def test_one_whose_removal_waits_for_the_server_is_not_found_meanwhile(server: RedisProcess) -> None:
    clock = Clock()
    tier, other = opened(server, clock=clock), opened(server)
    tier.store(stored())
    server.freeze()
    assert tier.query(IDS) == 0  # which finds out that the server is away
    assert tier.remove(IDS[:1]) == RemovalResult(0, 1, NOT_REACHED)
    assert tier.lookup([hash_of(LONG)]) == 0
    server.thaw()
    other.store(stored([]))
    comes_back(tier, clock)
    assert (counts(tier), there(other)) == ([[], []], [False] * 3)


def test_a_damaged_one_is_refused_and_removed(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store([entry_of(LONG)])
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    runs = [BlockRun("remote", 1, None)]
    assert fetched(manager, [LONG.record], runs, partial=LONG.partial) == [LONG.record]
    server.client().set(PREFIX + b"b:" + SPACE + hash_of(LONG), entry_of(SHORT).data)
    assert fetched(manager, [LONG.record], runs, partial=LONG.partial) == [None]
    assert (counts(tier), manager.stats()["remote"].corrupt) == ([[], []], {"hash": 1})
    manager.offload([LONG])
    assert manager.flush(DEADLINE)
    assert fetched(manager, [LONG.record], runs, partial=LONG.partial) == [LONG.record]
    assert manager.close(DEADLINE)


@pytest.mark.parametrize("damaged", ["place", "owner"])
def test_a_malformed_entry_of_the_index_is_counted_and_not_found(server: RedisProcess, damaged: str) -> None:
    writer, client = opened(server), server.client()
    writer.store(stored([SHORT, LONG]))
    if damaged == "place":
        client.hset(PREFIX + b"partial:" + SPACE, hash_of(LONG), b"short")
    else:
        client.hset(PREFIX + b"meta:" + SPACE, hash_of(LONG), b"1:10:1:\xff")
    reader = opened(server)
    assert (counts(reader), reader.stats().errors) == ([[2], []], {"malformed entry": 1})
    assert reader.load([hash_of(SHORT), hash_of(LONG)]) == [entry_of(SHORT), None]


def restarted(server: RedisProcess) -> None:
    """From the last dump."""
    server.kill()
    server.start()


def test_after_a_restart_from_an_earlier_dump_processes_have_what_the_server_has(server: RedisProcess) -> None:
    """Though it has the same key, and each connects anew unnoticed."""
    writer, reader = opened(server), opened(server)
    writer.store(ENTRIES[:1])
    server.client().save()
    writer.store([entry_of(LONG)])
    reader.refresh()
    restarted(server)
    for tier in (writer, reader):
        tier.refresh()
        assert (tier.stats().errors, counts(tier), tier.query(IDS)) == ({}, [[], []], 1)


def test_a_process_that_the_server_did_not_answer_reads_all_anew(server: RedisProcess) -> None:
    """It may have lost changes since, and have later ones of others."""
    clock = Clock()
    reader, writer = opened(server, clock=clock), opened(server)
    writer.store(ENTRIES[:1])
    server.client().save()
    writer.store([entry_of(LONG)])
    reader.refresh()
    server.kill()
    reader.refresh()
    assert reader.stats().circuit is Circuit.OPEN
    server.start()
    opened(server).store([entry_of(SHORT)])
    comes_back(reader, clock)
    assert counts(reader) == [[2], []]


def test_a_process_that_knows_of_later_numbers_than_the_server_reads_all_anew(server: RedisProcess) -> None:
    """The server's clock was put back when it began anew with an earlier state."""
    writer, reader, client = opened(server), opened(server), server.client()
    writer.store(stored())
    clock = int(client.hget(PREFIX + b"state", "clock"))
    client.hset(PREFIX + b"state", "clock", clock + 10**12)
    reader.refresh()
    client.hset(PREFIX + b"state", "clock", clock)
    writer.remove([hash_of(SHORT)])
    reader.refresh()
    assert counts(reader) == [[3], [3]]


def test_one_that_a_load_does_not_find_is_not_found_any_more(server: RedisProcess) -> None:
    writer, reader = opened(server), opened(server)
    writer.store(stored())
    reader.refresh()
    writer.remove([hash_of(LONG)])
    assert there(reader) == [True, False, True]
    assert counts(reader) == [[2], [3]]


def test_one_that_was_stored_while_a_load_did_not_find_it_is_found(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = opened(server)
    use = BlockServer.use

    def stored_meanwhile(self: BlockServer, ttl_ms: int, block_hashes: list[bytes]) -> object:
        answer = use(self, ttl_ms, block_hashes)
        tier.store(stored())
        return answer

    monkeypatch.setattr(BlockServer, "use", stored_meanwhile)
    assert there(tier) == [False] * 3
    assert counts(tier) == [[2, 3], [3]]


def test_one_that_an_earlier_version_has_evicted_is_taken_out_of_the_index_by_a_load(server: RedisProcess) -> None:
    """It knows of a block's record and of its places in `meta` and `lru` alone."""
    tier, other = opened(server), opened(server)
    tier.store(stored())
    client, member = server.client(), SPACE + hash_of(LONG)
    client.delete(PREFIX + b"b:" + member)
    client.zrem(PREFIX + b"lru:", member)
    client.hdel(PREFIX + b"meta:" + SPACE, hash_of(LONG))
    assert there(tier) == [True, False, True]
    assert client.hget(PREFIX + b"partial:" + SPACE, hash_of(LONG)) is None
    other.refresh()
    assert counts(other) == [[2], [3]]


OTHERS = [sha256(bytes([number])).digest() for number in range(3)]


def test_removals_that_the_server_forgets_cost_no_partial_block(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, REMEMBERED=1)
    tier = opened(server)
    tier.store(stored())
    tier.remove(OTHERS)
    assert int(server.client().hget(PREFIX + b"state", "floor")) > tier.removals_seen - 10**6
    assert there(tier) == [True] * 3


def test_when_a_removal_by_an_earlier_version_is_forgotten_what_it_named_goes_for_good(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what was stored after it."""
    limit(monkeypatch, REMEMBERED=1)
    tier = opened(server)
    tier.store(stored([SHORT, PRIVATE]))
    server.client().zadd(PREFIX + b"removed", {SPACE + IDS[0]: tier.removals_seen})
    tier.store([entry_of(LONG)])
    tier.remove(OTHERS)
    assert server.client().zscore(PREFIX + b"removed", SPACE + IDS[0]) is None
    assert (there(tier), counts(tier)) == ([False, True, False], [[3], []])


@pytest.mark.parametrize("is_behind", [False, True])
def test_where_an_earlier_version_has_forgotten_removals_none_that_is_older_is_served(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch, is_behind: bool
) -> None:
    limit(monkeypatch, REMEMBERED=1)
    tier = opened(server)
    tier.store(stored())
    server.client().hset(PREFIX + b"state", "floor", tier.removals_seen + 1)
    if is_behind:  # this version has let the server forget others since
        tier.remove(OTHERS)
    assert there(tier) == [False] * 3
    assert (tier.store(stored()).count, there(tier)) == (4, [True] * 3)


def test_what_an_earlier_version_has_evicted_is_swept_from_the_index(server: RedisProcess) -> None:
    tier = opened(server)
    tier.store(stored([SHORT]))
    client, member = server.client(), SPACE + hash_of(SHORT)
    client.delete(PREFIX + b"b:" + member)
    client.zrem(PREFIX + b"lru:", member)
    client.hdel(PREFIX + b"meta:" + SPACE, hash_of(SHORT))
    eventually(lambda: not refreshed(tier).errors and counts(tier) == [[], []])
    assert client.keys(b"*named:*") + client.keys(b"*stored:*") + client.keys(b"*partial:*") == []
