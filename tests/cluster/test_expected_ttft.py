"""The policy that expects a time to first token at each replica, and what the router remembers for it."""

from collections import Counter
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emberkv.cluster.policies import ExpectedTtft, ReplicaState, RoutingReason, RoutingView
from emberkv.cluster.routing import DEFAULT_ROUTING, Decision, Router, RoutingRequest, make_router, names
from emberkv.core.events import POOL
from emberkv.core.hashing import TokenChain
from emberkv.errors import ConfigError

BLOCK = 16
RATE = 1000.0  # tokens a second


def fleet(count: int, **state: float) -> tuple[Router, list[ReplicaState]]:
    router = make_router(DEFAULT_ROUTING, Random(1), names(count))
    return router, [ReplicaState(prefill_rate=RATE, **state) for _ in range(count)]


def prompt(start: int, blocks: int, shared: int = 0) -> TokenChain:
    """The first ``shared`` blocks are the same in all prompts."""
    head, tail = range(shared * BLOCK), range(1_000_000 + start * 100_000, 1_000_000 + start * 100_000 + blocks * BLOCK)
    return TokenChain(bytes(32), [*head, *tail], BLOCK)


def decide(
    router: Router, states: list[ReplicaState], chain: TokenChain, session: str = "", now: float = 0.0
) -> Decision:
    decision = router.decide(RoutingRequest(chain, len(chain), session, now), states)
    assert decision is not None
    return decision


def has(router: Router, slot: int, chain: TokenChain, blocks: int, tier: str = POOL) -> None:
    assert router.index is not None
    router.index.add(slot, chain.block_hashes[:blocks], tier)


def test_a_decision_says_what_it_expects_of_each_replica() -> None:
    router, states = fleet(3)
    chain = prompt(0, 100)
    has(router, 1, chain, 50)
    states[1].queued_tokens = 500
    states[2].up = False
    decision = decide(router, states, chain)
    assert (decision.replica, decision.reason, decision.cached_tokens) == (1, RoutingReason.LEAST_COST, 800)
    first, second = decision.estimates
    assert (first.slot, first.waiting, first.computing, dict(first.cached_tokens)) == (0, 0.0, 1.6, {})
    assert (second.slot, second.waiting, second.computing, dict(second.cached_tokens)) == (1, 0.5, 0.8, {POOL: 800})
    assert second.ttft == pytest.approx(1.3)


def test_a_prefix_is_left_when_waiting_for_it_costs_more_than_computing_it() -> None:
    router, states = fleet(2)
    chain = prompt(0, 100)
    has(router, 1, chain, 50)
    states[1].queued_tokens = 2 * 800 + 200  # a token to compute weighs two that wait
    assert decide(router, states, chain).replica == 0


def test_blocks_of_lower_tiers_count_by_the_time_it_takes_to_load_them() -> None:
    router, states = fleet(2)
    chain = prompt(0, 100)
    has(router, 1, chain, 100, "disk")
    states[1].load_rates = {"disk": 16_000.0}
    decision = decide(router, states, chain)
    assert (decision.replica, decision.estimates[1].loading) == (1, {"disk": pytest.approx(0.1, abs=0.001)})
    states[1].load_rates = {"disk": RATE / 2}
    slow = decide(router, states, prompt(0, 100)).estimates[1]
    assert (slow.loading, slow.computing) == ({}, 1.6), "computing is faster, and the worker would compute"


def test_a_machine_that_computes_faster_gets_a_prompt_that_no_replica_has() -> None:
    router, states = fleet(3)
    states[2].prefill_rate = 10 * RATE
    assert decide(router, states, prompt(0, 100)).replica == 2
    states[2].prefill_rate = 1.2 * RATE
    assert decide(router, states, prompt(1, 100)).reason is RoutingReason.TIE, "so small a difference is noise"


def test_a_cold_fleet_spreads_prefixes_and_always_in_the_same_way() -> None:
    found = []
    for _ in range(2):
        router, states = fleet(4)
        found.append([decide(router, states, prompt(number, 10)).replica for number in range(80)])
    assert found[0] == found[1]
    assert set(Counter(found[0])) == {0, 1, 2, 3}
    assert max(Counter(found[0]).values()) <= 30


def test_a_prompt_on_its_way_counts_where_it_is_computed_until_its_time_is_over() -> None:
    router, states = fleet(4)
    one, other = prompt(1, 2, shared=100), prompt(2, 2, shared=100)
    first = decide(router, states, one).replica
    states[first].queued_tokens = len(one)
    second = decide(router, states, other, now=1.0)
    assert (second.replica, second.cached_tokens) == (first, 1600)
    assert decide(router, states, other, now=100.0).cached_tokens == 0


def test_turns_of_a_session_stay_at_one_replica_while_load_allows() -> None:
    router, states = fleet(8)
    homes: dict[int, set[int]] = {}
    for turn in range(1, 6):
        for session in range(40):
            decision = decide(router, states, prompt(session, 10 * turn), f"session-{session}", now=100.0 * turn)
            homes.setdefault(session, set()).add(decision.replica)
            has(router, decision.replica, prompt(session, 10 * turn), 10 * turn)
    assert all(len(each) == 1 for each in homes.values())
    (home,) = homes[0]
    states[home].queued_tokens = 10_000
    assert decide(router, states, prompt(0, 60), "session-0", now=900.0).replica != home


def test_a_session_without_any_cached_block_goes_to_the_replica_that_had_it() -> None:
    router, states = fleet(8)
    home = decide(router, states, prompt(1, 0, shared=0), "short").replica
    later = [decide(router, states, TokenChain(bytes(32), [turn], BLOCK), "short", now=99.0 * turn) for turn in (1, 2)]
    assert [(each.replica, each.reason) for each in later] == [(home, RoutingReason.SESSION)] * 2


def test_conversations_that_begin_go_to_those_that_were_given_less() -> None:
    router, states = fleet(4)
    for number in range(400):
        decision = decide(router, states, prompt(number, 20 if number % 4 else 200), now=100.0 * number)
        states[decision.replica].load += len(prompt(number, 20 if number % 4 else 200))
    loads = [state.load for state in states]
    assert max(loads) / (sum(loads) / 4) <= 1.15


def test_a_replica_that_left_is_no_home_and_computes_nothing() -> None:
    router, states = fleet(2)
    chain = prompt(0, 100)
    home = decide(router, states, chain, "a").replica
    router.leave(home)
    assert router.join("late") == home
    decision = decide(router, states, chain, "a", now=0.1)
    assert (decision.reason, decision.cached_tokens) == (RoutingReason.TIE, 0)


STATES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 100)), min_size=2, max_size=5)
LATELY = [0.0, 1e6, 0.0, 0.0, 0.0]
"""What replicas were given to compute: the second one nearly all."""


@given(STATES, st.lists(st.floats(0, 1e6), min_size=5, max_size=5), st.integers(0, 1))
@example([(4800, 100), (0, 0)], LATELY, 0).via("waits as long as any that is chosen")
def test_no_replica_is_chosen_that_waits_longer_than_its_prompt_is_worth(
    given_states: list[tuple[int, int]], recent: list[float], home: int
) -> None:
    states = [ReplicaState(queued_tokens=queued, prefill_rate=RATE) for queued, _ in given_states]
    cached = [{POOL: blocks} for _, blocks in given_states]
    order = list(range(len(states)))
    view = RoutingView(100 * BLOCK + 1, BLOCK, states, cached, order, recent[: len(states)], home)
    chosen = ExpectedTtft().choose(view).replica
    waits = [state.queued_tokens / RATE for state in states]
    assert waits[chosen] - min(waits) <= (1.5 * 2 + 0.03) * view.prompt_tokens / RATE


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="spread 2"):
        ExpectedTtft(spread=2)
