"""What a gateway learns of a store that no worker's snapshot lists, such as a Redis server."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from emberkv.cluster.membership import Membership
from emberkv.cluster.routing import make_router
from emberkv.cluster.wire import SharedTier, WorkerDescription
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.core.events import BlockRemoved, BlockStored
from tests.cluster.fake_workers import FakeConnection, FakeWorker
from tests.waiting import on_a_loop, until

STORE = SharedTier(b"r" * 16, is_listed=False, is_scanned=True)
BLOCKS = [bytes([number]) * 32 for number in range(1, 4)]


async def no_model(_worker: Worker, _description: WorkerDescription) -> None: ...


@asynccontextmanager
async def followed(*workers: FakeWorker) -> AsyncGenerator[Membership]:
    """A membership that follows them; each has its place in the index by its position."""
    by_url = {f"http://{worker.worker_id}": worker for worker in workers}
    router = make_router("longest-prefix", random.Random(0))
    membership = Membership(router, lambda url: FakeConnection(by_url[url]), on_model=no_model)
    for position, url in enumerate(by_url, 1):
        membership.add(url)
        await until(lambda position=position: len(membership.up) == position)
    try:
        yield membership
    finally:
        await membership.close()


def known(membership: Membership, workers: int) -> list[dict[str, int]]:
    assert membership.router.index is not None
    return membership.router.index.matches(BLOCKS, workers)


@on_a_loop
async def test_what_a_server_has_is_read_once_for_all_that_share_it() -> None:
    tiers = {"disk": SharedTier(b"d" * 16, is_listed=True), "remote": STORE}
    workers = [FakeWorker(name, shared_tiers=tiers, stored=BLOCKS) for name in ("a", "b")]
    async with followed(*workers) as membership:
        await until(lambda: known(membership, 2) == [{"remote": 3}, {"remote": 3}])
        assert [worker.scans for worker in workers] == [["remote"], []]


@on_a_loop
async def test_another_worker_is_asked_where_one_does_not_reach_the_server() -> None:
    cut_off = FakeWorker("a", shared_tiers={"remote": STORE}, stored=None)
    async with followed(cut_off, FakeWorker("b", shared_tiers={"remote": STORE}, stored=BLOCKS)) as membership:
        await until(lambda: known(membership, 2) == [{"remote": 3}, {"remote": 3}])


@on_a_loop
async def test_a_server_is_read_again_when_no_worker_that_shares_it_was_left() -> None:
    worker = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberkv.cluster.membership.RETRY_SECONDS", 0.0)
        async with followed(worker) as membership:
            worker.die()
            await until(lambda: membership.workers[0].status is WorkerStatus.DOWN)
            own, worker.fingerprint = worker.fingerprint, "of other weights"
            worker.restart()
            await until(lambda: membership.workers[0].status is WorkerStatus.INCOMPATIBLE)
            assert membership.workers[0].slot is None
            worker.fingerprint = own
            worker.restart()
            await until(lambda: membership.up)
            await until(lambda: known(membership, 1) == [{"remote": 3}])
            assert worker.scans == ["remote", "remote"]


@pytest.mark.parametrize("before", [{}, {"remote": SharedTier(b"o" * 16, is_listed=False, is_scanned=True)}])
@on_a_loop
async def test_a_worker_that_gets_to_know_its_server_has_what_is_there_from_then_on(
    before: dict[str, SharedTier],
) -> None:
    first = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS[:1])
    late = FakeWorker("b", shared_tiers=before, stored=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberkv.cluster.membership.RETRY_SECONDS", 0.0)
        async with followed(first, late) as membership:
            await until(lambda: known(membership, 2) == [{"remote": 1}, {}])
            first.stored = BLOCKS
            late.change(shared_tiers={"remote": STORE}, stored=BLOCKS)
            await until(lambda: known(membership, 2) == [{"remote": 3}, {"remote": 3}])
            assert (first.scans, late.scans) == (["remote"] * 2, ["remote"] * len(before))
            late.change(shared_tiers=before, stored=())
            await until(lambda: known(membership, 2) == [{"remote": 3}, {}])
            assert [worker.status for worker in membership.workers] == [WorkerStatus.UP] * 2


def stored(*block_hashes: bytes) -> BlockStored:
    return BlockStored(block_hashes, bytes(32), (), 4, "remote")


def removed(*block_hashes: bytes) -> BlockRemoved:
    return BlockRemoved(block_hashes, tier="remote")


def each_known(membership: Membership) -> list[bool]:
    """Of each of `BLOCKS`, whether the first worker has it."""
    assert membership.router.index is not None
    return [bool(membership.router.index.matches([block], 1)[0]) for block in BLOCKS]


@pytest.mark.parametrize("reverse", [False, True])
@on_a_loop
async def test_events_from_before_a_worker_is_met_change_nothing_of_what_its_server_has(reverse: bool) -> None:
    """The first block was evicted by a worker and stored again by the other; the second was stored and has expired."""
    workers = [
        FakeWorker("a", log=(removed(BLOCKS[1]), removed(BLOCKS[0]))),
        FakeWorker("b", log=(stored(BLOCKS[1]), stored(BLOCKS[0]))),
    ]
    for worker in workers:
        worker.shared_tiers, worker.stored = {"remote": STORE}, BLOCKS[:1]
    async with followed(*sorted(workers, key=lambda worker: worker.worker_id, reverse=reverse)) as membership:
        await until(lambda: all(worker.exact for worker in membership.workers))
        await until(lambda: each_known(membership) == [True, False, False])
        for worker in workers:
            worker.change(log=(*worker.log, stored(BLOCKS[2])))
        await until(lambda: each_known(membership) == [True, False, True])


@on_a_loop
async def test_what_a_worker_has_changed_before_it_is_met_is_read_though_the_server_was_read_before() -> None:
    first = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS[:1])
    second = FakeWorker("b", shared_tiers={"remote": STORE}, stored=BLOCKS[:1])
    async with followed(first, second) as membership:
        await until(lambda: each_known(membership) == [True, False, False])
        membership.deregister("b")
        for worker in (first, second):
            worker.stored = BLOCKS[1:]
        second.log = (removed(BLOCKS[0]), stored(*BLOCKS[1:]))
        second.restart()
        await until(lambda: each_known(membership) == [False, True, True])


@on_a_loop
async def test_a_server_is_read_again_when_a_workers_events_were_lost() -> None:
    worker = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS[:1])
    async with followed(worker) as membership:
        await until(lambda: each_known(membership) == [True, False, False])
        worker.change(stored=BLOCKS[1:], log=(removed(BLOCKS[0]), stored(*BLOCKS[1:])), unkept=2)
        await until(lambda: each_known(membership) == [False, True, True])
        assert worker.scans == ["remote", "remote"]


@pytest.mark.parametrize("stored", [None, [None]], ids=["no answer", "a fault in what the worker sends"])
@on_a_loop
async def test_a_server_that_could_not_be_read_is_read_when_it_can(stored: Any) -> None:
    worker = FakeWorker("a", shared_tiers={"remote": STORE}, stored=stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberkv.cluster.membership.RETRY_SECONDS", 0.0)
        async with followed(worker) as membership:
            await until(lambda: len(worker.scans) > 1)
            worker.stored = BLOCKS
            await until(lambda: known(membership, 1) == [{"remote": 3}])


@on_a_loop
async def test_another_worker_is_asked_where_one_ends_while_its_server_is_read() -> None:
    dying = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS)
    other = FakeWorker("b", shared_tiers={"remote": STORE}, stored=BLOCKS)
    async with followed(dying, other) as membership:
        await until(lambda: known(membership, 2)[1] == {"remote": 3})
        dying.ends_scans_at = 1
        dying.change(log=(removed(BLOCKS[0]),), unkept=1)
        await until(lambda: not dying.alive)
        await until(lambda: known(membership, 2)[1] == {"remote": 3})
        assert (dying.scans, other.scans) == (["remote", "remote"], ["remote"])


@on_a_loop
async def test_a_server_that_no_worker_names_any_more_is_forgotten_and_read_anew_when_one_does() -> None:
    worker = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberkv.cluster.membership.RETRY_SECONDS", 0.0)
        async with followed(worker) as membership:
            await until(lambda: known(membership, 1) == [{"remote": 3}])
            for tiers, expected in (({}, {}), ({"remote": STORE}, {"remote": 3})):
                worker.die()
                await until(lambda: not membership.up)
                worker.shared_tiers = tiers
                worker.restart()
                await until(lambda expected=expected: membership.up and known(membership, 1) == [expected])
            assert worker.scans == ["remote", "remote"]


@on_a_loop
async def test_a_store_that_cannot_be_read_is_never_asked_for() -> None:
    tiers = {"remote": SharedTier(b"m" * 16, is_listed=False)}
    worker = FakeWorker("a", shared_tiers=tiers, log=(stored(BLOCKS[1]),))
    async with followed(worker) as membership:
        await until(lambda: membership.workers[0].exact)
        worker.change(log=(*worker.log, stored(BLOCKS[0])))
        await until(lambda: each_known(membership) == [True, True, False])
        assert worker.scans == []


@on_a_loop
async def test_a_server_is_read_again_when_a_worker_has_restarted_that_sends_no_events_yet() -> None:
    worker = FakeWorker("a", shared_tiers={"remote": STORE}, stored=BLOCKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emberkv.cluster.membership.RETRY_SECONDS", 0.0)
        async with followed(worker) as membership:
            await until(lambda: each_known(membership) == [True, True, True])
            worker.die()
            await until(lambda: not membership.up)
            worker.stored = BLOCKS[:1]
            worker.restart()
            await until(lambda: each_known(membership) == [True, False, False])


@on_a_loop
async def test_a_server_is_not_asked_again_through_any_worker_before_a_pause() -> None:
    workers = [FakeWorker(name, shared_tiers={"remote": STORE}, stored=None) for name in "ab"]
    pauses, goes_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        pauses.set()
        await goes_on.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Membership, "_pause", lambda _membership: pause())
        async with followed(*workers) as membership:
            await until(pauses.is_set)
            for _ in range(100):
                await asyncio.sleep(0)
            assert sum(len(worker.scans) for worker in workers) <= len(workers)
            for worker in workers:
                worker.stored = BLOCKS
            goes_on.set()
            await until(lambda: each_known(membership) == [True, True, True])
