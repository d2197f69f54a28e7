"""The stopwatch: runs of steps last what their steps last, and are cut between two of them."""

from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.scheduler import StepPlan
from emberkv.sim.timing import CONTEXT_BUCKET, StepClock


class ByContext:
    """A step takes a microsecond a sequence and a nanosecond for each token of context."""

    def step_seconds(self, plan: StepPlan) -> float:
        raise AssertionError("these steps only decode")

    def decode_seconds(self, sequences: int, context: int) -> float:
        return sequences * 1e-6 + context * 1e-9


def one_by_one(sequences: int, context: int, steps: int) -> list[int]:
    clock = StepClock(ByContext())
    return [clock.decode(sequences, context + step * sequences) for step in range(steps)]


RUNS = (st.integers(1, 300), st.integers(1, 5000), st.integers(1, 400))


@given(*RUNS)
def test_a_run_lasts_what_its_steps_last(sequences: int, context: int, steps: int) -> None:
    run = StepClock(ByContext()).run(sequences, context, steps)
    assert run.duration == sum(one_by_one(sequences, context, steps))


@given(*RUNS, st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_run_is_cut_where_a_step_ends(sequences: int, context: int, steps: int, share: float) -> None:
    durations = one_by_one(sequences, context, steps)
    elapsed = max(1, int(share * sum(durations)))
    count, duration = StepClock(ByContext()).run(sequences, context, steps).cut(elapsed)
    assert duration == sum(durations[:count]) >= elapsed
    assert sum(durations[: count - 1]) < elapsed


def test_contexts_of_a_bucket_take_as_long_as_its_middle() -> None:
    clock = StepClock(ByContext())
    middle = CONTEXT_BUCKET // 2
    assert {clock.decode(1, context) for context in range(CONTEXT_BUCKET)} == {1000 + middle}
    assert clock.decode(1, CONTEXT_BUCKET) == 1000 + CONTEXT_BUCKET + middle
