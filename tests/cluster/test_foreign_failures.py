"""Foreign workers that fail, refuse, hang or end a connection: what a gateway retries, and what its client gets."""

import asyncio

from emberkv.cluster.foreign.fleet import GIVEN_UP_AFTER
from emberkv.cluster.workers import WorkerStatus
from emberkv.errors import WorkerTimeoutError
from tests.cluster.fake_openai import FakeOpenAI
from tests.cluster.foreign_gateway import chat, served
from tests.waiting import DEADLINE, on_a_loop, until


@on_a_loop
async def test_a_request_is_retried_elsewhere_when_its_worker_dies_before_the_first_token() -> None:
    for is_stream, dies_after in ((False, 0), (True, 0), (True, 1)):
        async with served(FakeOpenAI(dies_after=dies_after), FakeOpenAI(dies_after=dies_after)) as it:
            it.servers[1].dies_after = None
            answers = [
                await it.ask(chat(f"{number}", stream=is_stream), **{"x-session-id": f"{number}"})
                for number in range(3)
            ]
            assert [answer.status_code for answer in answers] == [200] * 3
            assert all("error" not in answer.text for answer in answers)
            retried = [answer for answer in answers if "retried=1" in answer.headers["x-emberkv-route"]]
            assert len(retried) == len({sent for sent, _ in it.servers[0].requests})


@on_a_loop
async def test_a_request_on_a_kept_connection_that_is_closed_is_sent_again_and_its_worker_not_blamed() -> None:
    async with served(FakeOpenAI()) as it:
        (worker,) = it.fleet.workers
        it.servers[0].drops_kept = 1
        await until(lambda: it.servers[0]._known)
        while it.servers[0].drops_kept:  # a health check may be under way on the kept connection
            assert (await it.ask(chat())).status_code == 200
        assert worker.lost == 0


@on_a_loop
async def test_a_request_that_ends_its_connections_leaves_the_workers_up_and_is_given_up() -> None:
    servers = [FakeOpenAI(dies_after=0) for _ in range(3)]
    async with served(*servers) as it:
        answer = await it.ask(chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        assert all(it.asked())
        assert [worker.status for worker in it.fleet.workers] == [WorkerStatus.UP] * 3
        for server in servers:
            server.dies_after = None
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
async def test_a_worker_whose_connection_ended_is_checked_at_once() -> None:
    async with served(FakeOpenAI(dies_after=0)) as it:
        (worker,) = it.fleet.workers
        it.fleet.seconds = DEADLINE * 10
        checks = it.servers[0].checks
        await until(lambda: it.servers[0].checks > checks)  # the last one that was due by itself
        it.servers[0].health = 503
        await it.ask(chat())
        await until(lambda: worker.status is WorkerStatus.STARTING)


@on_a_loop
async def test_a_busy_worker_is_passed_over_and_its_refusal_kept_where_all_are_busy() -> None:
    async with served(FakeOpenAI(status=429), FakeOpenAI(status=429)) as it:
        answer = await it.ask(chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert it.asked() == [1, 1]
        it.servers[1].status = 200
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
async def test_a_worker_that_is_gone_is_down_and_comes_back_with_nothing_cached() -> None:
    async with served(FakeOpenAI()) as it:
        worker = it.fleet.workers[0]
        await it.ask(chat())
        assert worker.as_json()["assumed_blocks"] > 0
        it.servers[0].health = 503
        await until(lambda: worker.status is WorkerStatus.STARTING)
        refused = await it.ask(chat())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        it.servers[0].health = 200
        await until(lambda: worker.status is WorkerStatus.UP)
        assert worker.as_json()["assumed_blocks"] > 0


@on_a_loop
async def test_a_worker_that_hangs_is_given_up() -> None:
    async with served(FakeOpenAI(), FakeOpenAI()) as it:
        for server in it.servers:
            server.held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat()))
        await until(lambda: any(server.requests for server in it.servers))
        number = it.asked().index(1)
        other = it.servers[1 - number].held
        assert other is not None
        other.set()
        for _ in range(GIVEN_UP_AFTER):
            it.fleet.failed(it.fleet.workers[number], WorkerTimeoutError("it answers no check"))
        answer = await asked
        assert answer.status_code == 200
        assert "retried=1" in answer.headers["x-emberkv-route"]


@on_a_loop
async def test_an_answer_under_way_is_ended_with_an_error_when_the_gateway_stops() -> None:
    async with served(FakeOpenAI()) as it:
        it.servers[0].held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat()))
        await until(lambda: it.servers[0].requests)
        await it.gateway.lifecycle.drain(0.0)
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopped")
