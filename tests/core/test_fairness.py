"""Tenants share steps and admissions: first tokens come soon, totals follow weights, large requests do not starve."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.policies.fair_shares import Share
from emberkv.core.scheduler import StepPlan
from emberkv.core.sequence import FinishReason, Sequence
from emberkv.core.waiting_queue import TokenCounters
from emberkv.errors import ConfigError
from tests.core.harness import Harness


def unlike(number: int, length: int) -> list[int]:
    """A prompt that shares no block with that of another number."""
    return [10_000 * number + at for at in range(length)]


def steps_to_first_token(harness: Harness, sequence: Sequence, at_most: int) -> int:
    for step in range(1, at_most + 1):
        harness.step()
        if sequence.num_generated:
            return step
    raise AssertionError(f"no first token within {at_most} steps")


def computed(plan: StepPlan) -> Counter[str]:
    """Tokens by tenant."""
    tokens = Counter(each.tenant for each in plan.decodes)
    for chunk in plan.prefills:
        tokens[chunk.sequence.tenant] += chunk.stop - chunk.start
    return tokens


def test_the_lowest_counter_by_weight_is_next_and_idleness_earns_nothing() -> None:
    counters = TokenCounters({"heavy": 2.0})
    counters.serve("heavy", 10)
    counters.serve("light", 10)
    assert (counters["heavy"], counters["light"]) == (5.0, 10.0)
    counters.serve("light", 90)  # while the other is idle
    counters.activate("heavy")
    counters.activate("new")
    assert (counters["heavy"], counters["new"], counters["light"]) == (10.0, 10.0, 100.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_finite_and_above_0(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"the weight of 'a' is .*; it must be a finite number above 0"):
        TokenCounters({"a": weight})


def test_one_tenant_against_a_hundred_long_requests_of_another() -> None:
    """All slots and most of the pool are taken, and a queue waits."""
    harness = Harness(num_blocks=300, chunk=8, max_step_tokens=16)
    for number in range(100):
        harness.add(f"bob{number}", unlike(number, 60), new=60, salt=b"bob")
    for _ in range(50):
        harness.step()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting > 50) == (8, True)
    short = harness.add("short", unlike(200, 6), salt=b"ann")
    assert steps_to_first_token(harness, short, 3) == 1
    assert harness.pool.stats.preemptions == 1
    long = harness.add("long", unlike(201, 60), salt=b"ann")
    steps_to_first_token(harness, long, 2 * 8)  # with what 8 decodes leave of a step, 8 if she were alone


def test_a_lone_tenant_has_everything() -> None:
    harness = Harness(num_blocks=140)
    for number in range(12):
        harness.add(f"{number}", unlike(number, 20), new=3, salt=b"bob")
    for _ in range(3):
        assert harness.step().num_tokens > 16 - 4
    harness.finish()
    assert harness.pool.stats.preemptions == 0


def test_a_short_prompt_does_not_wait_for_a_long_one_of_its_own_tenant() -> None:
    harness = Harness(num_blocks=140, max_step_tokens=8)
    long = harness.add("long", unlike(1, 200))
    harness.step()
    for number in range(2, 6):
        short = harness.add(f"{number}", unlike(number, 4))
        before = long.num_computed
        assert steps_to_first_token(harness, short, 3) == 1
        assert long.num_computed == before + 4  # half of the step
    harness.finish()


def test_where_long_prompts_are_not_separate_a_tenant_is_served_first_come_first_served() -> None:
    harness = Harness(num_blocks=140, max_step_tokens=8, separate_long_prompts=False)
    long = harness.add("long", unlike(1, 80))
    harness.step()
    short = harness.add("short", unlike(2, 4))
    assert steps_to_first_token(harness, long, 9) == 9
    assert short.num_computed == 0
    harness.finish()


def test_a_long_prompt_of_which_all_but_the_end_is_cached_is_short() -> None:
    harness = Harness(num_blocks=140, max_step_tokens=8)
    harness.add("first turn", unlike(1, 80))
    harness.finish()
    long = harness.add("long", unlike(2, 200))
    harness.step()
    turn = harness.add("second turn", [*unlike(1, 80), 7, 7, 7])
    assert steps_to_first_token(harness, turn, 3) <= 2
    assert (turn.cached_tokens, long.num_generated) == (80, 0)
    harness.finish()


def test_long_prompts_of_one_tenant_are_first_come_first_served() -> None:
    harness = Harness(num_blocks=140, max_step_tokens=8)
    first, second = (harness.add(f"{number}", unlike(number, 40)) for number in (1, 2))
    for _ in range(5):
        harness.step()
    assert (first.num_generated, second.num_computed) == (1, 0)
    harness.finish()


def test_a_request_within_its_floor_passes_one_that_does_not_fit() -> None:
    harness = Harness(num_blocks=20, shares={"ann": Share(floor_bytes=4)})
    harness.add("warm", unlike(1, 15), salt=b"ann")
    harness.finish()
    harness.add("running", unlike(2, 40), new=20, salt=b"bob")
    waiting = harness.add("waiting", unlike(3, 40), salt=b"bob")
    for _ in range(5):
        harness.step()
    small = harness.add("small", unlike(4, 10), salt=b"ann")
    assert steps_to_first_token(harness, small, 3) == 1
    assert (waiting.lease, harness.pool.stats.preemptions) == (None, 0)
    harness.finish()


@pytest.mark.parametrize("other", [b"bob", b"ann"], ids=["another tenant's", "its own tenant's"])
def test_small_requests_do_not_starve_a_large_one(other: bytes) -> None:
    harness = Harness(num_blocks=16, max_running=6, max_step_tokens=12)
    for number in range(6):
        harness.add(f"early{number}", unlike(number, 7), new=4, salt=other)
    harness.step()
    large = harness.add("large", unlike(900, 50), salt=b"ann")
    passed = 0
    for number in range(1000):
        harness.add(f"late{number}", unlike(10 + number, 7), new=4, salt=other)
        passed += len([each for each in harness.step().admitted if each is not large])
        if large.num_generated:
            break
    assert large.num_generated == 1
    # An admission is 7 prompt tokens: after a pool's worth of them, and those running then, it is the large one's turn.
    assert passed <= 16 * 4 / 7 + 2 * 6
    harness.scheduler.finish("large", FinishReason.ABORT)


def test_who_preempts_another_tenant_stays_within_its_share() -> None:
    """Two tenants with endless work settle at half of the slots each, and preempt no more from then on."""
    harness = Harness(num_blocks=300, max_step_tokens=32)
    for number in range(60):
        harness.add(f"bob{number}", unlike(number, 9), new=90, salt=b"bob")
    for _ in range(6):
        harness.step()
    for number in range(60):
        harness.add(f"ann{number}", unlike(100 + number, 9), new=90, salt=b"ann")
    for _ in range(12):
        harness.step()
    preemptions = harness.pool.stats.preemptions
    assert Counter(each.tenant for each in harness.scheduler.running) == {"ann": 4, "bob": 4}
    assert preemptions == 4
    for _ in range(60):
        harness.step()
        assert Counter(each.tenant for each in harness.scheduler.running)["ann"] == 4
    assert harness.pool.stats.preemptions == preemptions


def test_a_sequence_that_grows_takes_blocks_from_the_tenant_with_most() -> None:
    harness = Harness(num_blocks=12, max_step_tokens=64)
    bobs = [harness.add(f"bob{number}", unlike(number, 11), new=9, salt=b"bob") for number in range(3)]
    harness.step()
    ann = harness.add("ann", unlike(9, 6), new=9, salt=b"ann")
    for _ in range(14):
        harness.step()
    assert (ann.num_preemptions, bobs[0].num_preemptions) == (0, 0)
    assert bobs[2].num_preemptions > 0
    harness.finish()


WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=4)


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS, budget=st.sampled_from([4, 8, 24]), seed=st.integers(0, 10**6))
def test_what_tenants_with_endless_work_get_follows_their_weights(weights: list[float], budget: int, seed: int) -> None:
    random = Random(seed)
    names = [f"t{index}" for index in range(len(weights))]
    by_name = dict(zip(names, weights, strict=True))
    harness = Harness(num_blocks=100, max_step_tokens=budget, weights=by_name)
    total: Counter[str] = Counter()
    added, number = dict.fromkeys(names, 0), 0
    for _ in range(120):
        for name in names:  # more than a step can compute
            while added[name] < total[name] + 2 * budget:
                number += 1
                tokens = unlike(number, random.randrange(1, 40))
                harness.add(f"{number}", tokens, salt=name.encode())
                added[name] += len(tokens)
        plan = harness.step()
        assert plan.num_tokens > budget - harness.chunk, "budget is left, though all have work"
        total += computed(plan)
    served = [total[name] / by_name[name] for name in names]
    assert max(served) - min(served) <= 2 * harness.chunk / min(weights)


@settings(max_examples=60, deadline=None)
@given(
    tenants=st.integers(1, 4),
    length=st.integers(1, 40),
    budget=st.sampled_from([1, 8, 24]),
    max_running=st.integers(5, 9),
    seed=st.integers(0, 10**6),
)
def test_no_tenant_waits_longer_than_its_turn(
    tenants: int, length: int, budget: int, max_running: int, seed: int
) -> None:
    """One request of a tenant that comes to floods of others: each chunk of it waits for one of each other at most."""
    random = Random(seed)
    harness = Harness(num_blocks=300, max_step_tokens=budget, max_running=max_running)
    for number in range(60):
        tokens = unlike(number, random.randrange(1, 50))
        harness.add(f"{number}", tokens, random.randrange(1, 20), salt=b"flood%d" % (number % tenants))
    for _ in range(random.randrange(30)):
        harness.step()
    lone = harness.add("lone", unlike(900, length), salt=b"lone")
    chunks = -(-length // harness.chunk)
    steps_to_first_token(harness, lone, chunks * (tenants + 1) + 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_plan_is_empty_only_when_there_is_nothing_to_do(seed: int) -> None:
    """Random tenants in a small pool: while anything waits or runs, each step computes, until all is done."""
    random = Random(seed)
    harness = Harness(
        num_blocks=random.randrange(8, 20),
        max_running=random.randrange(1, 5),
        max_step_tokens=random.choice([1, 8, 24]),
        weights={"a": 3.0},
    )
    for number in range(40):
        tokens = unlike(number % 7, random.randrange(1, 24))
        harness.add(f"{number}", tokens, random.randrange(1, 8), salt=random.choice([b"a", b"b", b"c"]))
        for _ in range(random.randrange(3)):
            if harness.scheduler.num_running + harness.scheduler.num_waiting:
                assert harness.scheduler.has_work
                assert harness.step()
    harness.finish(20_000)
