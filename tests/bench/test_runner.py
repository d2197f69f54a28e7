"""A workload played: conversations grow, the limit on concurrency holds, and no request is lost."""

import asyncio
from typing import Any

import httpx

from emberkv.bench.runner import BenchWorkload, Phase
from tests.bench.fake_server import PLAIN, Event, FakeServer
from tests.waiting import DEADLINE


def test_each_turn_repeats_the_conversation_so_far_and_adds_the_next_question() -> None:
    server = FakeServer()
    workload = BenchWorkload(sessions=1, turns=3, concurrency=1)
    asyncio.run(server.run(workload))
    first, second, third = (body["messages"] for body in server.bodies)
    answer = {"role": "assistant", "content": "one two"}
    assert first == [*workload.opening(), workload.question(0, 0)]
    assert second == [*first, answer, workload.question(0, 1)]
    assert third == [*second, answer, workload.question(0, 2)]


def test_answers_are_limited_to_the_tokens_asked_for() -> None:
    server = FakeServer()
    asyncio.run(server.run(BenchWorkload(sessions=1, turns=1, answer_tokens=9)))
    assert server.bodies[0]["max_tokens"] == 9


def test_records_come_by_session_and_turn() -> None:
    records = asyncio.run(FakeServer().run(BenchWorkload(sessions=3, turns=2, concurrency=2)))
    assert [(r.session, r.turn) for r in records] == [(s, t) for s in range(3) for t in range(2)]


def test_as_many_conversations_as_asked_run_at_a_time_and_no_more() -> None:
    async def play() -> int:
        server = FakeServer(gate=asyncio.Barrier(3).wait)  # hangs if fewer than 3 are ever in flight
        await asyncio.wait_for(server.run(BenchWorkload(sessions=6, turns=2, concurrency=3)), DEADLINE)
        return server.most_in_flight

    assert asyncio.run(play()) == 3


def test_only_the_first_request_is_cold_when_conversations_follow_each_other() -> None:
    records = asyncio.run(FakeServer().run(BenchWorkload(sessions=2, turns=2, concurrency=1)))
    assert [r.phase for r in records] == [Phase.COLD, Phase.FOLLOW_UP, Phase.FIRST_TURN, Phase.FOLLOW_UP]


def test_all_requests_sent_before_the_first_text_are_cold() -> None:
    async def play() -> list[Phase]:
        server = FakeServer(gate=asyncio.Barrier(2).wait)
        records = await asyncio.wait_for(server.run(BenchWorkload(sessions=4, turns=1, concurrency=2)), DEADLINE)
        return [record.phase for record in records]

    assert asyncio.run(play()) == [Phase.COLD, Phase.COLD, Phase.FIRST_TURN, Phase.FIRST_TURN]


def test_without_a_shared_prompt_every_first_turn_is_cold() -> None:
    records = asyncio.run(FakeServer().run(BenchWorkload(sessions=2, turns=1, concurrency=1, system_tokens=0)))
    assert [record.phase for record in records] == [Phase.COLD, Phase.COLD]


def test_a_failed_turn_ends_its_conversation_but_not_the_others() -> None:
    workload = BenchWorkload(sessions=2, turns=3, concurrency=1)
    doomed = workload.question(0, 1)

    def script(body: dict[str, Any]) -> list[Event] | httpx.Response:
        return httpx.Response(500, text="boom") if body["messages"][-1] == doomed else list(PLAIN)

    server = FakeServer(script)
    records = asyncio.run(server.run(workload))
    errors = [record.error for record in records]
    assert errors[0] is None
    assert errors[1] is not None
    assert "boom" in errors[1]
    assert errors[2] == "not sent: an earlier turn of the conversation failed"
    assert errors[3:] == [None, None, None]
    assert len(server.bodies) == 5


def test_the_same_workload_sends_the_same_requests() -> None:
    first, second = FakeServer(), FakeServer()
    workload = BenchWorkload(sessions=2, turns=2, concurrency=1, seed=5, nonce="n")
    asyncio.run(first.run(workload))
    asyncio.run(second.run(workload))
    assert first.bodies == second.bodies
