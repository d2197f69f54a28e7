"""Sources: conversations that grow and wait for their answers, and traces that do not, or do."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emberkv.workload.request import After, Request
from emberkv.workload.source import ClosedLoopTraceSource, GeneratedSource, Source, TraceSource, unroll
from tests.workload.build import request, workload

ROOT = bytes(32)
SYSTEM = {"s": {"count": 50, "skew": 1.0, "tokens": 100}}


def arrivals(source: Source) -> Iterator[Request]:
    while (found := source.next_arrival()) is not None:
        yield found


def shared_blocks(one: Request, other: Request, block_size: int = 10) -> int:
    left, right = (each.chain(ROOT, block_size).block_hashes for each in (one, other))
    return sum(a == b for a, b in zip(left, right, strict=False))


def test_first_turns_arrive_by_themselves_and_follow_ups_after_thinking() -> None:
    source = GeneratedSource(workload())
    firsts = list(arrivals(source))
    assert [each.arrival_time for each in firsts] == [0.0, 0.5, 1.0, 1.5]
    assert {each.turn for each in firsts} == {0}
    second = source.completed(firsts[0], at=100.0, generated=10)
    assert second is not None
    assert (second.arrival_time, second.turn, second.session_id) == (104.0, 1, firsts[0].session_id)
    assert second.after == After(firsts[0].request_id, 4.0)
    third = source.completed(second, at=200.0, generated=10)
    assert third is not None
    assert source.completed(third, at=300.0, generated=10) is None


def test_a_prompt_is_everything_before_and_a_new_message() -> None:
    source = GeneratedSource(workload())
    first = source.next_arrival()
    assert first is not None
    second = source.completed(first, at=1.0, generated=10)
    assert second is not None
    assert (first.prompt_tokens, second.prompt_tokens) == (20, 50)
    assert shared_blocks(first, second) == 2
    answered = first.chain(ROOT, 10)
    for _ in range(10):
        answered.append(0)
    assert answered.block_hashes == second.chain(ROOT, 10).block_hashes[:3]


def test_what_was_really_generated_counts() -> None:
    source = GeneratedSource(workload(client={"max_output_tokens": 64}))
    first = source.next_arrival()
    assert first is not None
    assert (first.output_tokens, first.max_output_tokens) == (10, 64)
    second = source.completed(first, at=1.0, generated=4)
    assert second is not None
    assert second.prompt_tokens == 20 + 4 + 20


def test_an_answer_is_no_longer_than_the_limit() -> None:
    first = GeneratedSource(workload(client={"output": 100, "max_output_tokens": 64})).next_arrival()
    assert first is not None
    assert (first.output_tokens, first.max_output_tokens) == (64, 64)


def test_sessions_share_the_system_prompt_and_nothing_else() -> None:
    source = GeneratedSource(
        workload(client={"system_prompts": "s"}, system_prompts={"s": {"count": 1, "skew": 0, "tokens": 100}})
    )
    one, other = source.next_arrival(), source.next_arrival()
    assert one is not None
    assert other is not None
    assert one.prompt_tokens == 120
    assert shared_blocks(one, other) == 10
    apart = GeneratedSource(workload())
    assert shared_blocks(*(each for each, _ in zip(arrivals(apart), range(2), strict=False))) == 0


def test_popularity_follows_zipf() -> None:
    """With skew 1 the first of 50 is chosen with chance 1 / H(50) = 0.2223, and twice as often as the second."""
    source = GeneratedSource(workload(client={"system_prompts": "s"}, system_prompts=SYSTEM, sessions=20_000))
    counts = Counter(each.content.pieces[0] for each in arrivals(source)).most_common()
    assert len(counts) == 50
    assert counts[0][1] / 20_000 == pytest.approx(0.2223, rel=0.05)
    assert counts[0][1] / counts[1][1] == pytest.approx(2, rel=0.1)


def test_profiles_come_by_weight_and_stay_with_their_session() -> None:
    clients = [
        {"name": name, "weight": weight, "message": 9, "output": 1, "turns": 2, "think_time": 0}
        for name, weight in (("often", 3), ("rare", 1))
    ]
    source = GeneratedSource(workload(clients=clients, sessions=4000))
    names = Counter[str]()
    for first in arrivals(source):
        follow_up = source.completed(first, at=first.arrival_time, generated=1)
        assert follow_up is not None
        assert follow_up.client_id == first.client_id
        names[first.client_id] += 1
    assert names["often"] / 4000 == pytest.approx(0.75, rel=0.03)


def test_a_conversation_ends_before_it_outgrows_its_context() -> None:
    source = GeneratedSource(workload(client={"turns": 100, "max_context": 100}))
    turns = list(unroll(source, first_token=0, per_token=0))
    assert {each.session_id: each.turn for each in turns} == dict.fromkeys(["s0", "s1", "s2", "s3"], 2)
    assert max(each.prompt_tokens + each.max_output_tokens for each in turns) == 90


def test_a_lost_request_ends_its_conversation_and_leaves_nothing() -> None:
    source = GeneratedSource(workload(sessions=1))
    first = source.next_arrival()
    assert first is not None
    source.lost(first)
    with pytest.raises(KeyError):
        source.completed(first, at=1.0, generated=10)


def test_duration_ends_new_conversations() -> None:
    source = GeneratedSource(workload(sessions=None, duration=1.2))
    assert [each.arrival_time for each in arrivals(source)] == [0.0, 0.5, 1.0]
    assert source.next_arrival() is None


RANDOM: dict[str, Any] = {
    "arrivals": {"kind": "gamma", "rate": 3, "burstiness": 2}, "system_prompts": SYSTEM, "sessions": 20,
    "client": {"system_prompts": "s", "message": {"kind": "lognormal", "median": 50, "p90": 200},
               "turns": {"kind": "geometric", "mean": 3}, "think_time": {"kind": "exponential", "mean": 5}},
}  # fmt: skip


def drawn(**changes: object) -> list[Request]:
    return list(unroll(GeneratedSource(workload(**{**RANDOM, **changes})), first_token=1, per_token=0.1))


def test_the_same_seed_gives_the_same_requests() -> None:
    assert drawn() == drawn()
    assert [each.prompt_tokens for each in drawn()] != [each.prompt_tokens for each in drawn(seed=2)]


def test_nothing_depends_on_hash_randomisation() -> None:
    script = "from tests.workload.test_source import drawn; print(drawn())"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1] != ""


def test_what_a_session_says_does_not_depend_on_when_others_complete() -> None:
    def turns(order: list[int]) -> list[int]:
        source = GeneratedSource(workload(**RANDOM))
        firsts = list(arrivals(source))
        follow_ups = {at: source.completed(firsts[at], at=9.0, generated=1) for at in order}
        return [each.prompt_tokens for at in range(20) if (each := follow_ups[at])]

    assert turns(list(range(20))) == turns(list(range(20))[::-1])


def test_unrolling_keeps_the_order_of_arrival_and_the_assumed_times() -> None:
    turns = list(unroll(GeneratedSource(workload()), first_token=1.0, per_token=0.5))
    assert len(turns) == 12
    times = [each.arrival_time for each in turns]
    assert times == sorted(times)
    assert [each.arrival_time for each in turns if each.session_id == "s0"] == [0.0, 9.5, 19.0]


def follower(name: str, leader: str, at: float) -> Request:
    return replace(request(name, 9, 1, at=at), after=After(leader, 2.0))


def test_a_trace_arrives_as_recorded_or_waits_for_its_answers() -> None:
    trace = [request("a", 9, 1, at=0.0), follower("b", "a", 5.0), follower("c", "clipped", 6.0)]
    as_recorded = TraceSource(trace)
    assert [each.request_id for each in arrivals(as_recorded)] == ["a", "b", "c"]
    assert as_recorded.completed(trace[0], at=1.0, generated=1) is None
    waiting = ClosedLoopTraceSource(trace)
    assert [(each.request_id, each.arrival_time) for each in arrivals(waiting)] == [("a", 0.0), ("c", 6.0)]
    assert waiting.completed(trace[0], at=1.0, generated=1) == replace(trace[1], arrival_time=3.0)
    assert waiting.completed(trace[1], at=4.0, generated=1) is None
