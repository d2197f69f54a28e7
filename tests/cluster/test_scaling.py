"""Which workers there should be, by what they report."""

import pytest

from emberkv.cluster.scaling import RecentWorth, ScalingLimits, ScalingMemory, WorkerLoad, choose_workers
from emberkv.errors import ConfigError

NAMES = ["worker-0", "worker-1", "worker-2", "worker-3"]
IDLE = WorkerLoad(0.0, 0.0)


def busy(backlog: float) -> WorkerLoad:
    return WorkerLoad(backlog, 0.0)


def test_missing_workers_are_added_in_order() -> None:
    chosen = choose_workers(NAMES, {"worker-1": IDLE}, ScalingLimits(3, 3), ScalingMemory(), now=0.0)
    assert chosen == {"worker-0", "worker-1", "worker-2"}


def test_the_worker_whose_cache_is_worth_least_is_given_up() -> None:
    worths = {"worker-0": 500.0, "worker-1": 20.0, "worker-2": 90_000.0}
    running = {name: WorkerLoad(0.0, worth) for name, worth in worths.items()}
    assert choose_workers(NAMES, running, ScalingLimits(2, 2), ScalingMemory(), now=0.0) == {"worker-0", "worker-2"}


def test_none_is_given_up_before_all_have_reported() -> None:
    running = {"worker-0": IDLE, "worker-1": None, "worker-2": IDLE}
    assert choose_workers(NAMES, running, ScalingLimits(1, 1), ScalingMemory(), now=0.0) == set(running)


def test_a_worker_is_added_once_the_backlog_has_lasted() -> None:
    limits, memory = ScalingLimits(2, 4, target_backlog=2.0, grow_seconds=10.0), ScalingMemory()
    running = {"worker-0": busy(5.0), "worker-1": busy(1.0)}
    assert [len(choose_workers(NAMES, running, limits, memory, now)) for now in (0.0, 9.0, 10.0)] == [2, 2, 3]


def test_a_backlog_that_comes_and_goes_adds_none() -> None:
    limits, memory = ScalingLimits(1, 4, target_backlog=2.0, grow_seconds=10.0), ScalingMemory()
    for now in range(0, 60, 5):
        load = busy(3.0) if now % 10 == 0 else busy(1.0)
        assert choose_workers(NAMES, {"worker-0": load}, limits, memory, float(now)) == {"worker-0"}


def test_many_are_added_at_once_for_a_large_backlog() -> None:
    limits, memory = ScalingLimits(1, 4, target_backlog=1.0, grow_seconds=0.0), ScalingMemory()
    assert len(choose_workers(NAMES, {"worker-0": busy(100.0)}, limits, memory, 0.0)) == 4


def test_a_worker_is_given_up_after_a_long_calm_and_not_below_the_least() -> None:
    limits, memory = ScalingLimits(1, 4, shrink_seconds=300.0), ScalingMemory()
    running = {"worker-0": IDLE, "worker-1": WorkerLoad(0.0, 7.0)}
    assert [len(choose_workers(NAMES, running, limits, memory, now)) for now in (0.0, 299.0)] == [2, 2]
    assert choose_workers(NAMES, running, limits, memory, 300.0) == {"worker-1"}
    assert choose_workers(NAMES, {"worker-1": IDLE}, limits, memory, 1e6) == {"worker-1"}


def test_hits_of_long_ago_count_for_little() -> None:
    worth = RecentWorth(half_life=600.0)
    assert worth.update(1000, now=0.0) == 1000.0
    assert worth.update(1000, now=600.0) == 500.0
    assert worth.update(1300, now=600.0) == 800.0


def test_a_worker_that_started_anew_counts_from_nothing() -> None:
    worth = RecentWorth(half_life=600.0)
    worth.update(1000, now=0.0)
    assert worth.update(40, now=600.0) == 540.0


@pytest.mark.parametrize(("workers", "most"), [(0, 3), (4, 3)])
def test_limits_that_contradict_each_other_are_refused(workers: int, most: int) -> None:
    with pytest.raises(ConfigError, match=f"workers is {workers}, max_workers {most}"):
        ScalingLimits(workers, most)
