"""Requests over workers that come, go, refuse and fail, as a gateway's engine carries them out."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from emberkv.cluster.cluster_engine import MAX_LOSSES, ClusterEngine
from emberkv.cluster.membership import Membership
from emberkv.cluster.routing import RoutingReason, make_router
from emberkv.cluster.wire import LoadReport, SharedTier, WorkerDescription
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.core.feed import EventsLost, FeedMessage, SnapshotChunk
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, PrefillProgress, SamplingParams, TokenOutput
from emberkv.errors import (
    DuplicateRequestError,
    EmberError,
    EngineStoppedError,
    PromptTooLongError,
    RequestError,
    WireError,
)
from emberkv.serving.admission import ConcurrencyLimit
from emberkv.serving.errors import GenerationFailedError, NotReadyError, OverloadedError, TooManyRequestsError
from tests.cluster.fake_workers import FakeConnection, FakeWorker, expected
from tests.waiting import on_a_loop

PROMPT = [5, 6, 7, 8, 9]


class Cluster:
    """An engine over fake workers, and what it has answered."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.model: WorkerDescription | None = None
        self.engine: ClusterEngine | None = None
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.ended: dict[str, asyncio.Event] = {}

    async def until(self, *workers: str, status: WorkerStatus = WorkerStatus.UP) -> None:
        """Until these have the status, by URL."""
        while any(self.worker(url).status is not status for url in workers):
            await self.membership.changed()

    def worker(self, url: str) -> Worker:
        return next(each for each in self.membership.workers if each.url == url)

    def submit(self, name: str, count: int = 8, **params: Any) -> None:
        assert self.engine is not None
        outputs = self.outputs[name] = []
        ended = self.ended[name] = asyncio.Event()

        def listen(output: TokenOutput) -> None:
            outputs.append(output)
            if output.finish_reason is not None:
                ended.set()

        self.engine.submit(
            GenerationRequest(name, PROMPT, SamplingParams(max_tokens=count, **{"temperature": 0.0, **params})), listen
        )

    async def answer(self, name: str, count: int = 8, **params: Any) -> list[int]:
        """All tokens of a request that must end well."""
        self.submit(name, count, **params)
        await self.ended[name].wait()
        last = self.outputs[name][-1]
        assert last.finish_reason is FinishReason.LENGTH, last
        return self.tokens(name)

    async def refusal(self, name: str) -> EmberError | None:
        """What the request was refused with."""
        self.submit(name)
        await self.ended[name].wait()
        (output,) = self.outputs[name]
        assert output.finish_reason is FinishReason.ERROR
        return output.refusal

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


@asynccontextmanager
async def cluster(workers: Mapping[str, FakeWorker], **settings: Any) -> AsyncIterator[Cluster]:
    """workers: by URL. All that are alive are up."""
    made: list[Cluster] = []

    async def has_model(_: Worker, description: WorkerDescription) -> None:
        made[0].model = description

    membership = Membership(
        make_router("round-robin", random.Random(0)), lambda url: FakeConnection(workers[url]), on_model=has_model
    )
    each = Cluster(membership)
    made.append(each)
    for url in workers:
        membership.add(url)
    await each.until(*(url for url, worker in workers.items() if worker.alive))
    assert each.model is not None
    each.engine = ClusterEngine(membership, each.model, rng=random.Random(1), **settings)
    try:
        yield each
    finally:
        await each.engine.stop()
        await membership.close()


@on_a_loop
async def test_requests_are_spread_and_answered() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        for name in "wxyz":
            assert await it.answer(name) == expected(PROMPT, 8)
        assert [len(worker.requests) for worker in workers.values()] == [2, 2]
        assert it.engine is not None
        route = it.engine.route("x")
        assert route is not None
        assert route.workers == ["b"]


@on_a_loop
async def test_a_route_has_the_reason_for_each_of_its_workers() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b", dies_after=2)}
    async with cluster(workers) as it:
        ended = asyncio.Event()

        def listen(output: TokenOutput) -> None:
            if output.finish_reason is not None:
                ended.set()

        assert it.engine is not None
        params = SamplingParams(max_tokens=4, temperature=0.0)
        it.engine.submit(GenerationRequest("x", PROMPT, params, worker="b"), listen)
        await ended.wait()
        route = it.engine.route("x")
        assert route is not None
        assert route.workers == ["b", "a"]
        assert route.reasons == {"b": RoutingReason.SEQUENCE, "a": RoutingReason.TURN}


@on_a_loop
async def test_a_message_that_is_not_understood_fails_its_request_and_not_the_worker() -> None:
    workers = {"a": FakeWorker("a", refuses=WireError("these 9 bytes are not the message expected"))}
    async with cluster(workers) as it:
        assert isinstance(await it.refusal("x"), GenerationFailedError)
        assert len(workers["a"].requests) == MAX_LOSSES
        assert it.worker("a").status is WorkerStatus.UP


@on_a_loop
async def test_a_worker_that_unloads_its_model_is_idle_and_was_never_down() -> None:
    workers = {"a": FakeWorker("a")}
    async with cluster(workers) as it:
        seen = [it.worker("a").status]
        workers["a"].change(is_loaded=False)
        while seen[-1] is not WorkerStatus.IDLE:
            await it.membership.changed()
            seen.append(it.worker("a").status)
        assert seen == [WorkerStatus.UP, WorkerStatus.IDLE]


@on_a_loop
async def test_a_full_gateway_still_takes_a_tenant_that_has_less_than_its_part() -> None:
    async with cluster(
        {"a": FakeWorker("a", hangs=True)}, in_flight=ConcurrencyLimit(3, {"one": 2.0, "other": 1.0})
    ) as it:
        engine = it.engine
        assert engine is not None
        ended = asyncio.Event()

        def submit(name: str, tenant: str) -> None:
            params = SamplingParams(max_tokens=2, temperature=0.0)
            engine.submit(GenerationRequest(name, PROMPT, params, tenant=tenant), lambda _: ended.set())

        for number in range(3):
            submit(f"one-{number}", "one")
        submit("other-0", "other")
        for tenant in ("one", "other", "unknown"):
            with pytest.raises(TooManyRequestsError):
                submit("refused", tenant)
        engine.abort("other-0")
        await ended.wait()
        submit("other-1", "other")


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("dies_after", [1, 4, 7])
def test_an_answer_goes_on_at_another_worker(seed: int | None, dies_after: int) -> None:
    @on_a_loop
    async def run() -> None:
        workers = {"a": FakeWorker("a", dies_after=dies_after), "b": FakeWorker("b")}
        async with cluster(workers) as it:
            params = {"temperature": 1.0, "seed": seed}
            tokens = await it.answer("x", **params)
            first, rest = workers["a"].requests[0], workers["b"].requests[0]
            assert rest.answered == dies_after
            assert list(rest.prompt_token_ids) == PROMPT + tokens[:dies_after]
            assert rest.params == first.params
            assert first.params.seed is not None
            assert tokens == expected(PROMPT, 8, first.params.seed)
            assert {output.usage.prompt_tokens for output in it.outputs["x"] if output.usage} == {len(PROMPT)}
            assert it.engine is not None
            assert (it.engine.resumed, it.engine.retried) == (1, 0)

    run()


@on_a_loop
async def test_a_request_whose_answer_has_not_begun_is_sent_to_another_worker() -> None:
    workers = {"a": FakeWorker("a", dies_after=0), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        assert await it.answer("x") == expected(PROMPT, 8)
        assert workers["b"].requests[0].answered == 0
        assert it.engine is not None
        assert (it.engine.resumed, it.engine.retried) == (0, 1)
        assert it.worker("a").lost == 1


@on_a_loop
async def test_a_request_that_worker_after_worker_dies_of_is_given_up() -> None:
    workers = {name: FakeWorker(name, dies_after=0) for name in "abcde"}
    async with cluster(workers) as it:
        assert isinstance(await it.refusal("x"), GenerationFailedError)
        assert sum(worker.alive for worker in workers.values()) == len(workers) - MAX_LOSSES


@on_a_loop
async def test_an_answer_that_has_begun_waits_for_a_worker() -> None:
    workers = {"a": FakeWorker("a", dies_after=3)}
    async with cluster(workers) as it:
        it.submit("x")
        await it.until("a", status=WorkerStatus.DOWN)
        assert it.tokens("x") == expected(PROMPT, 3)
        workers["a"].restart()
        await it.ended["x"].wait()
        assert it.tokens("x") == expected(PROMPT, 8)


@on_a_loop
async def test_an_answer_that_no_worker_goes_on_with_ends_with_an_error() -> None:
    workers = {"a": FakeWorker("a", dies_after=3)}
    async with cluster(workers, resume_seconds=0.05) as it:
        it.submit("x")
        await it.ended["x"].wait()
        last = it.outputs["x"][-1]
        assert isinstance(last.refusal, NotReadyError)


@on_a_loop
async def test_an_answer_that_only_full_workers_are_left_for_ends_with_an_error_in_time() -> None:
    workers = {"a": FakeWorker("a", dies_after=3), "b": FakeWorker("b", refuses=OverloadedError("full"))}
    async with cluster(workers, resume_seconds=0.05) as it:
        it.submit("x")
        await it.ended["x"].wait()
        assert it.tokens("x") == expected(PROMPT, 3)
        assert isinstance(it.outputs["x"][-1].refusal, TooManyRequestsError)


@on_a_loop
async def test_without_a_worker_a_request_is_refused() -> None:
    workers = {"a": FakeWorker("a")}
    async with cluster(workers) as it:
        workers["a"].die()
        await it.until("a", status=WorkerStatus.DOWN)
        assert isinstance(await it.refusal("x"), NotReadyError)


@on_a_loop
async def test_a_worker_without_room_is_passed_over() -> None:
    workers = {"a": FakeWorker("a", refuses=OverloadedError("full", retry_after=3.0)), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        assert await it.answer("x") == expected(PROMPT, 8)
        assert it.worker("a").status is WorkerStatus.UP


@on_a_loop
async def test_where_all_are_full_the_soonest_says_when_to_ask_again() -> None:
    workers = {name: FakeWorker(name, refuses=OverloadedError("full", retry_after=after))
               for name, after in (("a", 3.0), ("b", 2.0))}  # fmt: skip
    async with cluster(workers) as it:
        error = await it.refusal("x")
        assert isinstance(error, TooManyRequestsError)
        assert error.retry_after == 2.0


@on_a_loop
async def test_what_a_worker_finds_wrong_with_a_request_is_its_refusal() -> None:
    workers = {"a": FakeWorker("a", refuses=PromptTooLongError("too long", param="prompt")), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        error = await it.refusal("x")
        assert isinstance(error, PromptTooLongError)
        assert error.param == "prompt"
        assert not workers["b"].requests


@on_a_loop
async def test_an_aborted_request_is_aborted_at_its_worker() -> None:
    workers = {"a": FakeWorker("a", hangs=True)}
    async with cluster(workers) as it:
        it.submit("x")
        await workers["a"].asked.wait()
        assert it.engine is not None
        it.engine.abort("x")
        await it.ended["x"].wait()
        assert [output.finish_reason for output in it.outputs["x"]] == [FinishReason.ABORT]
        assert workers["a"].aborted == ["x"]


@on_a_loop
async def test_a_worker_that_leaves_goes_on_to_leave_until_another_process_takes_its_place() -> None:
    worker = FakeWorker("a")
    async with cluster({"a": worker}) as it:
        it.membership.deregister("a")
        worker.change(alive=False)
        await it.until("a", status=WorkerStatus.DOWN)
        worker.change(alive=True)
        await it.until("a", status=WorkerStatus.DRAINING)
        worker.change(alive=False)
        await it.until("a", status=WorkerStatus.DOWN)
        worker.restart()
        await it.until("a")


@on_a_loop
async def test_more_requests_than_are_taken_are_refused() -> None:
    workers = {"a": FakeWorker("a", hangs=True)}
    async with cluster(workers, in_flight=ConcurrencyLimit(1)) as it:
        it.submit("x")
        with pytest.raises(DuplicateRequestError):
            it.submit("x")
        with pytest.raises(TooManyRequestsError):
            it.submit("y")


@on_a_loop
async def test_a_stopped_engine_ends_its_requests_and_takes_none() -> None:
    workers = {"a": FakeWorker("a", hangs=True)}
    async with cluster(workers) as it:
        it.submit("x")
        assert it.engine is not None
        await it.engine.stop()
        assert [output.finish_reason for output in it.outputs["x"]] == [FinishReason.ABORT]
        with pytest.raises(EngineStoppedError):
            it.submit("y")


@on_a_loop
async def test_a_draining_worker_gets_no_requests_and_finishes_what_it_has() -> None:
    workers = {"a": FakeWorker("a", hangs=True), "b": FakeWorker("b")}
    async with cluster(workers) as it:
        it.submit("x")
        await workers["a"].asked.wait()
        workers["a"].change(draining=True)
        await it.until("a", status=WorkerStatus.DRAINING)
        for name in "yz":
            assert await it.answer(name) == expected(PROMPT, 8)
        assert len(workers["b"].requests) == 2
        workers["a"].change(hangs=False)
        await it.ended["x"].wait()
        assert it.tokens("x") == expected(PROMPT, 8)


@on_a_loop
async def test_workers_of_another_model_or_block_size_get_no_requests() -> None:
    workers = {"a": FakeWorker("a"), "b": FakeWorker("b", fingerprint="g"), "c": FakeWorker("c", block_size=8)}
    workers["b"].alive = workers["c"].alive = False
    async with cluster(workers) as it:
        for name in "bc":
            workers[name].change(alive=True)
        await it.until("b", "c", status=WorkerStatus.INCOMPATIBLE)
        for name in "xyz":
            await it.answer(name)
        assert len(workers["a"].requests) == 3
        assert "weights" in it.worker("b").detail
        assert "8 tokens" in it.worker("c").detail


@on_a_loop
async def test_a_restarted_worker_is_up_again_with_its_new_epoch() -> None:
    workers = {"a": FakeWorker("a")}
    async with cluster(workers) as it:
        reader = it.worker("a").reader
        workers["a"].die()
        await it.until("a", status=WorkerStatus.DOWN)
        assert not it.worker("a").exact
        workers["a"].restart()
        await it.until("a")
        assert it.worker("a").exact
        assert reader is not None
        assert reader.epoch == b"e1+"


@on_a_loop
async def test_a_worker_that_registers_is_followed_and_may_move() -> None:
    workers = {"a": FakeWorker("a")}
    async with cluster(workers) as it:
        workers["b1"] = FakeWorker("b")
        it.membership.register("b", "b1")
        await it.until("b1")
        workers["b2"] = FakeWorker("b")
        with pytest.raises(RequestError, match="b1, which is up"):
            it.membership.register("b", "b2")
        workers["b1"].die()
        await it.until("b1", status=WorkerStatus.DOWN)
        it.membership.register("b", "b2")
        await it.until("b2")
        assert [worker.url for worker in it.membership.workers] == ["a", "b2"]
        assert not it.membership.deregister("b", "b1")
        assert it.worker("b2").status is WorkerStatus.UP
        assert it.membership.deregister("b", "b2")
        assert it.worker("b2").status is WorkerStatus.DRAINING
        assert not it.membership.deregister("c")


@on_a_loop
async def test_a_snapshot_that_cannot_be_read_is_not_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeConnection):
        async def events(self, after: int = 0) -> AsyncGenerator[FeedMessage | LoadReport, None]:
            yield EventsLost(b"e1", 5, 9)
            while True:
                yield LoadReport(worker_id="a", epoch=b"e1", sequence=0)
                await asyncio.sleep(0)

        async def snapshot(self, cursor: str = "") -> SnapshotChunk:
            raise ValueError("a fault in the code")

    membership = Membership(
        make_router("round-robin", random.Random(0)), lambda _: Broken(FakeWorker("a")), on_model=no_model
    )
    worker = membership.add("a")
    try:
        while "failed to follow" not in worker.detail:
            await membership.changed()
        assert worker.status is WorkerStatus.DOWN
        assert "a fault in the code" in caplog.text
    finally:
        await membership.close()


@on_a_loop
async def test_a_snapshot_replaces_what_is_known_of_a_shared_tier_that_it_lists_and_of_no_other() -> None:
    tiers = {"disk": SharedTier(b"d" * 16, is_listed=True), "remote": SharedTier(b"r" * 16, is_listed=False)}
    worker = FakeWorker("a", shared_tiers=tiers)
    router = make_router("longest-prefix", random.Random(0))
    membership = Membership(router, lambda _: FakeConnection(worker), on_model=no_model)
    followed = membership.add("a")
    try:
        while followed.status is not WorkerStatus.UP:
            await membership.changed()
        assert router.index is not None
        assert followed.reader is not None
        for tier, block in (("disk", b"1" * 32), ("remote", b"2" * 32)):
            router.index.add(0, [block], tier)
        followed.reader.take(EventsLost(b"e1", 5, 9))
        followed.reader.take(SnapshotChunk(b"e1", 9, "", None, 4, (), ()))
        assert router.index.matches([b"1" * 32], 1) == [{}]
        assert router.index.matches([b"2" * 32], 1) == [{"remote": 1}]
    finally:
        await membership.close()


async def no_model(_worker: Worker, _description: WorkerDescription) -> None: ...


@on_a_loop
async def test_the_progress_of_a_prompt_is_what_its_worker_says() -> None:
    workers = {"a": FakeWorker("a", hangs=True)}
    async with cluster(workers) as it:
        it.submit("x")
        assert it.engine is not None
        assert it.engine.progress("x") is None
        await workers["a"].asked.wait()
        assert it.engine.progress("x") == PrefillProgress(len(PROMPT) // 2, len(PROMPT))
        it.engine.abort("x")
        await it.ended["x"].wait()
