"""What a gateway has computed in the background, at one worker and only while that does nothing else."""

import asyncio

import pytest

from emberkv.cluster.cluster_engine import ClusterEngine
from emberkv.cluster.workers import WorkerStatus
from emberkv.core.sequence import BACKGROUND_PRIORITY, FinishReason
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput
from emberkv.serving.admission import ConcurrencyLimit
from emberkv.serving.errors import TooManyRequestsError
from tests.cluster.fake_workers import FakeWorker, expected
from tests.cluster.test_cluster_engine import PROMPT, Cluster, cluster, on_a_loop


def engine_of(it: Cluster) -> ClusterEngine:
    assert it.engine is not None
    return it.engine


def submit(it: Cluster, worker: str, name: str = "background") -> "asyncio.Future[TokenOutput]":
    """The last output of a prompt that is computed in the background at ``worker``."""
    last: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()

    def listen(output: TokenOutput) -> None:
        if output.finish_reason is not None:
            last.set_result(output)

    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = GenerationRequest(name, PROMPT, params, priority=BACKGROUND_PRIORITY, worker=worker)
    engine_of(it).submit(request, listen)
    return last


@on_a_loop
async def test_it_goes_to_the_worker_that_it_names_and_takes_no_turn_of_the_policy() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        await it.answer("x")
        assert engine_of(it).worker_of("x") == "a"
        for number in range(3):
            output = await submit(it, "a", f"background {number}")
            assert (output.finish_reason, output.token_ids) == (FinishReason.LENGTH, tuple(expected(PROMPT, 1)))
        await it.answer("y")
        assert engine_of(it).worker_of("y") == "b"
        assert [it.worker(url).background for url in "ab"] == [3, 0]
        assert [it.worker(url).requests for url in "ab"] == [1, 1]
        assert sum(engine_of(it).decisions.values()) == 2


@on_a_loop
async def test_it_is_not_begun_at_a_worker_that_has_something_to_do() -> None:
    workers = {"a": FakeWorker("a", hangs=True), "b": FakeWorker("b", running=1)}
    async with cluster(workers) as it:
        it.submit("x")
        await workers["a"].asked.wait()
        for worker in ("a", "b", "unknown"):
            assert engine_of(it).free_tokens(worker) is None
            assert (await submit(it, worker)).finish_reason is FinishReason.ABORT
        assert [len(worker.requests) for worker in workers.values()] == [1, 0]


@on_a_loop
async def test_its_route_is_not_remembered() -> None:
    async with cluster({"a": FakeWorker("a")}) as it:
        await it.answer("x")
        await submit(it, "a")
        assert engine_of(it).route("background") is None
        assert engine_of(it).worker_of("x") == "a"


@on_a_loop
async def test_it_does_not_count_among_the_requests_in_flight() -> None:
    worker = FakeWorker("a", hangs=True)
    async with cluster({"a": worker}, in_flight=ConcurrencyLimit(1)) as it:
        background = submit(it, "a")
        await worker.asked.wait()
        it.submit("x")
        assert (await background).finish_reason is FinishReason.ABORT
        with pytest.raises(TooManyRequestsError):
            it.submit("y")
        worker.change(hangs=False)
        await it.ended["x"].wait()
        assert it.tokens("x") == expected(PROMPT, 8)
        assert (await submit(it, "a")).finish_reason is FinishReason.LENGTH
        assert await it.answer("z") == expected(PROMPT, 8)


@on_a_loop
async def test_a_worker_has_an_epoch_while_it_is_up() -> None:
    worker = FakeWorker("a", dies_after=0)
    async with cluster({"a": worker}) as it:
        assert engine_of(it).epoch_of("a") == worker.epoch
        assert engine_of(it).epoch_of("") is None
        await submit(it, "a")
        await it.until("a", status=WorkerStatus.DOWN)
        assert engine_of(it).epoch_of("a") is None


@on_a_loop
async def test_it_is_begun_while_other_workers_are_busy() -> None:
    workers = {"a": FakeWorker("a", hangs=True), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        it.submit("x")
        await workers["a"].asked.wait()
        assert (await submit(it, "b")).finish_reason is FinishReason.LENGTH
        assert not it.ended["x"].is_set()


@on_a_loop
async def test_a_request_that_goes_there_ends_it_and_one_that_goes_elsewhere_does_not() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b", hangs=True)}
    async with cluster(workers) as it:
        background = submit(it, "b")
        await workers["b"].asked.wait()
        assert engine_of(it).free_tokens("b") is None, "one at a time"
        await it.answer("at a")
        assert not background.done()
        it.submit("at b")
        assert (await background).finish_reason is FinishReason.ABORT
        workers["b"].change(hangs=False)
        await it.ended["at b"].wait()
        assert workers["b"].aborted == ["background"]
        assert it.tokens("at b") == expected(PROMPT, 8)


@on_a_loop
async def test_requests_of_other_gateways_end_it() -> None:
    worker = FakeWorker("a", hangs=True)
    async with cluster({"a": worker}) as it:
        background = submit(it, "a")
        await worker.asked.wait()
        worker.change(running=0)
        await asyncio.sleep(0)
        assert not background.done(), "what is computed in the background is not reported"
        while not background.done():
            worker.change(running=1)
            await asyncio.sleep(0)
        assert background.result().finish_reason is FinishReason.ABORT


@on_a_loop
async def test_where_its_worker_is_lost_it_fails_and_goes_nowhere_else() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b", dies_after=0)}
    async with cluster(workers) as it:
        assert (await submit(it, "b")).finish_reason is FinishReason.ERROR
        await it.until("b", status=WorkerStatus.DOWN)
        assert not workers["a"].requests
