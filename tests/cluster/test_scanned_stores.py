"""What a gateway learns of a store that no worker's snapshot lists, such as a Redis server."""

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from emberkv.cluster.membership import Membership
from emberkv.cluster.routing import make_router
from emberkv.cluster.wire import SharedTier, WorkerDescription
from emberkv.cluster.workers import Worker, WorkerStatus
from tests.cluster.fake_workers import FakeConnection, FakeWorker
from tests.waiting import on_a_loop, until

STORE = SharedTier(b"r" * 16, is_listed=False)
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


@pytest.mark.parametrize("before", [{}, {"remote": SharedTier(b"o" * 16, is_listed=False)}])
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
            late.change(shared_tiers={"remote": STORE}, stored=BLOCKS)
            await until(lambda: known(membership, 2) == [{"remote": 3}, {"remote": 3}])
            assert (first.scans, late.scans) == (["remote"], ["remote"] * (len(before) + 1))
            late.change(shared_tiers=before, stored=())
            await until(lambda: known(membership, 2) == [{"remote": 3}, {}])
            assert [worker.status for worker in membership.workers] == [WorkerStatus.UP] * 2
