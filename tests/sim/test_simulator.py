"""Small simulations, worked out by hand: a prompt token takes 1 ms, a decoded token 10 ms, a block has 10 tokens."""

import pytest

import emberkv.engine.assembly as serving
from emberkv.core.scheduler import Scheduler
from emberkv.sim import build
from emberkv.sim.outcome import CacheEvent, RequestOutcome, Status, TurnKind
from emberkv.sim.replica import SimulatedRequest
from emberkv.workload.request import After
from emberkv.workload.source import ClosedLoopTraceSource, GeneratedSource
from tests.sim.build import config, run, single, turn
from tests.workload.build import span, workload

MS = 1_000_000


def test_the_simulated_scheduler_is_the_serving_one() -> None:
    ran = run([])
    scheduler = ran.simulator.replicas[0].scheduler
    assert type(scheduler) is build.Scheduler is serving.Scheduler is Scheduler
    assert type(scheduler.cache) is build.PrefixCache is serving.PrefixCache
    assert type(scheduler.cache.pool) is build.BlockPool is serving.BlockPool


def test_a_first_turn_computes_all_of_it() -> None:
    ran = run([turn("s", 0, 100, 50)])
    outcome = ran.outcomes["s.0"]
    assert (outcome.event, ran.cached("s.0")) == (CacheEvent.MISS_FULL, (0, 100))
    assert outcome.first_token == 100 * MS
    assert outcome.completion == (100 + 50 * 10) * MS, "the first token came with the prompt; then 49 and an end"
    assert (outcome.status, outcome.output_tokens) == (Status.COMPLETED, 50)
    ran.check_idle()


def test_decode_steps_are_taken_together_over_the_blocks_that_they_fill() -> None:
    replica, request = run([]).simulator.replicas[0], turn("s", 0, 100, 50)
    replica.submit(SimulatedRequest(request, 0, request.chain(bytes(32), block_size=10)))
    replica.add_arrivals()
    counts, now = [], 0
    while (step := replica.begin(now)) is not None:
        counts.append(step.count)
        now = step.ends
        replica.end_step()
    assert counts == [1, 50], "the prompt with the first token, and then 49 tokens and an end"
    assert replica.pool.num_cached == 15


def test_a_later_turn_computes_what_is_new() -> None:
    ran = run([turn("s", 0, 100, 50), turn("s", 1, 200, 5, at=10)])
    assert ran.cached("s.1") == (150, 50)
    outcome = ran.outcomes["s.1"]
    assert (outcome.event, outcome.turn) == (CacheEvent.CONVERSATIONAL_HIT, TurnKind.CONTINUES)
    assert outcome.first_token == 10_050 * MS


def test_hits_end_at_the_unit_that_the_server_rounds_to() -> None:
    ran = run([turn("s", 0, 100, 50), turn("s", 1, 200, 5, at=10)], hit_unit=40)
    assert ran.cached("s.1") == (120, 80)


def test_hits_that_are_not_rounded_go_on_into_a_partial_block() -> None:
    turns = [turn("s", 0, 103, 50), turn("s", 1, 200, 5, at=10)]
    assert run(turns).cached("s.1") == (150, 50)
    assert run(turns, hit_unit=1).cached("s.1") == (153, 47)


def test_a_repeat_hits_all_but_its_last_token_however_long_the_answer_was() -> None:
    repeats = [single("first", 15, 40, span("p", 15)), single("second", 15, 1, span("p", 15), at=10)]
    assert run(repeats, hit_unit=1).cached("second") == (14, 1)
    assert run(repeats).cached("second") == (10, 5)


def test_a_prompt_that_leaves_another_within_a_block_reuses_all_before() -> None:
    system = span("system", 47)
    requests = [single("a", 77, 1, system, span("a", 30)), single("b", 77, 1, system, span("b", 30), at=10)]
    requests.append(single("c", 61, 1, system, span("b", 9), span("c", 5), at=20))
    ran = run(requests, hit_unit=1)
    assert [ran.cached(name) for name in "abc"] == [(0, 77), (47, 30), (56, 5)]
    ran.check_idle()


def test_a_long_conversation() -> None:
    ran = run([turn("s", 0, 9_950, 50), turn("s", 1, 12_000, 5, at=100)], kv_blocks=3000)
    assert ran.cached("s.1") == (10_000, 2_000)


def test_an_answer_that_ends_at_its_limit_leaves_its_last_token_to_compute() -> None:
    ran = run([turn("s", 0, 100, 50, ends_early=False), turn("s", 1, 200, 5, at=10)], block_size=1)
    assert ran.cached("s.1") == (149, 51)
    assert ran.outcomes["s.0"].completion == (100 + 49 * 10) * MS


@pytest.mark.parametrize(
    ("block_size", "prompt", "cached", "event"),
    [
        (10, 100, 90, CacheEvent.CONVERSATIONAL_HIT),
        (10, 80, 70, CacheEvent.CONVERSATIONAL_HIT),
        (1, 100, 99, CacheEvent.FULL_HIT_NO_PREFILL_NEEDED),
        (10, 150, 140, CacheEvent.CONVERSATIONAL_HIT),
        (10, 151, 150, CacheEvent.FULL_HIT_NO_PREFILL_NEEDED),
        (10, 152, 150, CacheEvent.CONVERSATIONAL_HIT),
    ],
)
def test_a_later_prompt_that_is_no_longer_than_the_session(
    block_size: int, prompt: int, cached: int, event: CacheEvent
) -> None:
    ran = run([turn("s", 0, 100, 50), turn("s", 1, prompt, 5, at=10)], block_size=block_size)
    assert ran.cached("s.1") == (cached, prompt - cached)
    assert ran.outcomes["s.1"].event is event


def test_a_later_prompt_that_says_something_else_hits_what_it_has_in_common() -> None:
    other = single("s.1", 200, 5, span("s", 60), span("other", 140), at=10, session_id="s", turn=1)
    ran = run([turn("s", 0, 100, 50), other])
    assert ran.cached("s.1") == (60, 140)
    assert ran.outcomes["s.1"].event is CacheEvent.CONVERSATIONAL_HIT


def test_a_later_turn_whose_session_was_evicted_is_a_plain_miss() -> None:
    requests = [turn("s", 0, 100, 50), single("big", 189, 1, at=10), turn("s", 1, 170, 5, at=20)]
    ran = run(requests, kv_blocks=19)
    outcome = ran.outcomes["s.1"]
    assert (outcome.event, outcome.turn, ran.cached("s.1")) == (CacheEvent.MISS_FULL, TurnKind.CONTINUES, (0, 170))


def test_blocks_that_tokens_take() -> None:
    pool = run([], block_size=16).simulator.replicas[0].pool
    assert [pool.blocks_for(tokens) for tokens in (0, 16, 17)] == [0, 1, 2]


def test_a_prompt_of_nothing_is_rejected_and_the_rest_go_on() -> None:
    ran = run([single("none", 0, 5), single("some", 10, 1)])
    assert ran.outcomes["none"].status is Status.REJECTED
    assert ran.outcomes["none"].event is None
    assert ran.outcomes["some"].status is Status.COMPLETED


def test_a_request_larger_than_the_memory_is_rejected_and_the_rest_go_on() -> None:
    ran = run([single("large", 95, 6), single("fits", 95, 5), single("after", 20, 5, at=1)], kv_blocks=10)
    statuses = {name: outcome.status for name, outcome in ran.outcomes.items()}
    assert statuses == {"large": Status.REJECTED, "fits": Status.COMPLETED, "after": Status.COMPLETED}
    assert ran.outcomes["large"].completion is None
    ran.check_idle()


def test_an_answer_of_nothing_takes_the_prompt_only() -> None:
    outcome = run([single("a", 20, 0)]).outcomes["a"]
    assert (outcome.output_tokens, outcome.completion) == (0, 20 * MS)


def test_requests_that_share_a_system_prompt() -> None:
    system = span("system", 50)
    ran = run([turn("s", 0, 70, 1, at=0), single("a", 60, 1, system, at=1), single("b", 60, 1, system, at=2)])
    assert ran.outcomes["a"].event is CacheEvent.MISS_FULL
    assert (ran.outcomes["b"].event, ran.cached("b")) == (CacheEvent.CROSS_REQUEST_HIT, (50, 10))


def test_sessions_see_each_other_only_where_the_prefix_is_shared() -> None:
    ran = run([turn("s", 0, 100, 50), turn("t", 0, 100, 50, at=10), turn("t", 1, 200, 5, at=20)])
    assert (ran.outcomes["t.0"].event, ran.cached("t.0")) == (CacheEvent.MISS_FULL, (0, 100))
    assert ran.cached("t.1") == (150, 50)


def test_clients_with_salts_share_nothing() -> None:
    requests = [
        single(name, 60, 1, span("system", 60), at=float(at), client_id=client)
        for at, (name, client) in enumerate([("a", "x"), ("b", "y"), ("c", "x")])
    ]
    assert [run(requests).cached(name)[0] for name in "abc"] == [0, 50, 50]
    assert [run(requests, salted=True).cached(name)[0] for name in "abc"] == [0, 0, 50]


def test_waiting_counts_in_the_time_to_the_first_token() -> None:
    ran = run([single("a", 1000, 1), single("b", 10, 1, at=0.5)], prefill_chunk=2000, max_step_tokens=2000)
    assert ran.outcomes["b"].first_token == 1010 * MS


def test_two_decode_together() -> None:
    ran = run([single("a", 10, 3), single("b", 10, 3)])
    assert ran.outcomes["a"].completion == ran.outcomes["b"].completion == (20 + 2 * 20) * MS


def test_a_request_takes_a_while_to_get_to_a_replica() -> None:
    settings = config()
    outcomes: list[RequestOutcome] = []
    machine = build.Machine(10, 100, 1, build.ConstantRates(0, 0.001, 0.01), request_seconds=0.005)
    source = ClosedLoopTraceSource([single("a", 10, 1, at=1)])
    build.build(settings, machine, source, outcomes.append, lambda done, now: None).run()
    assert [(each.arrival, each.first_token) for each in outcomes] == [(1000 * MS, 1015 * MS)]


def test_requests_get_to_replicas_side_by_side() -> None:
    outcomes: list[RequestOutcome] = []
    rates = build.ConstantRates(0, 0.001, 0.01)
    machine = build.Machine(10, 100, 1, rates, request_seconds=0.04, request_token_seconds=0.001)
    source = ClosedLoopTraceSource([single("a", 10, 1, at=1), single("b", 30, 1, at=1.01)])
    build.build(config(), machine, source, outcomes.append, lambda done, now: None).run()
    assert [(each.arrival, each.first_token) for each in outcomes] == [(1000 * MS, 1060 * MS), (1010 * MS, 1110 * MS)]


def test_who_is_on_the_way_to_a_replica_at_the_end_is_unfinished() -> None:
    outcomes: list[RequestOutcome] = []
    machine = build.Machine(10, 100, 1, build.ConstantRates(0, 0.001, 0.01), request_seconds=0.04)
    source = ClosedLoopTraceSource([single("a", 10, 1, at=1)])
    build.build(config(stop_at=1.02), machine, source, outcomes.append, lambda done, now: None).run()
    assert [each.status for each in outcomes] == [Status.UNFINISHED]


def test_a_pool_that_is_too_small_preempts_and_computes_again() -> None:
    ran = run([single("a", 30, 40), single("b", 30, 40)], kv_blocks=9)
    outcome = ran.outcomes["b"]
    assert outcome.preemptions == 1
    assert outcome.prefilled_tokens > 30
    assert {each.output_tokens for each in ran.outcomes.values()} == {40}
    ran.check_idle()


def test_follow_ups_start_when_the_turn_before_completes() -> None:
    source = GeneratedSource(workload(sessions=1, client={"turns": 2}))
    ran = run(source)
    first, second = ran.outcomes["s0.0"], ran.outcomes["s0.1"]
    assert first.completion is not None
    assert second.arrival == first.completion + 4_000 * MS
    assert second.event is CacheEvent.CONVERSATIONAL_HIT


def test_follow_ups_of_a_rejected_turn_never_come() -> None:
    requests = [single("a", 2000, 1), single("b", 10, 1, at=5, after=After("a", 1)), single("c", 10, 1, at=9)]
    ran = run(ClosedLoopTraceSource(requests), kv_blocks=20)
    assert {name: each.status.value for name, each in ran.outcomes.items()} == {"a": "rejected", "c": "completed"}


def test_a_simulation_that_is_stopped_tells_who_is_unfinished() -> None:
    ran = run([single("a", 10, 5), single("b", 10, 100, at=0.02), single("late", 10, 5, at=3)], stop_at=1.0)
    statuses = {name: each.status.value for name, each in ran.outcomes.items()}
    assert statuses == {"a": "completed", "b": "unfinished"}
    assert ran.ending.at == 1.0
    assert 80 < ran.outcomes["b"].output_tokens < 100


def test_an_interrupt_keeps_what_there_is() -> None:
    class Impatient:
        """A source whose user presses Ctrl-C at the third request."""

        def __init__(self) -> None:
            self._left = [single("a", 10, 1), single("b", 500, 1, at=1), single("c", 10, 1, at=1.1)]

        def next_arrival(self) -> object:
            if len(self._left) == 1:
                raise KeyboardInterrupt
            return self._left.pop(0)

        def completed(self, request: object, at: float, generated: int) -> None:
            return None

        def lost(self, request: object) -> None:
            return None

    ran = run(Impatient())  # type: ignore[arg-type]  # the least that a source must be
    assert ran.ending.interrupted
    assert {name: each.status.value for name, each in ran.outcomes.items()} == {"a": "completed", "b": "unfinished"}
