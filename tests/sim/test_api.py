"""The simulator and the planner called from Python: the same results as the set-up's file gives."""

import gc
import json
from pathlib import Path
from threading import Event, Thread

import pytest

import emberkv
from emberkv.errors import ConfigError, WorkloadError
from emberkv.sim.plan import get_this
from emberkv.sim.run import COLLECT_AFTER
from tests.waiting import DEADLINE

CLIENT = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
SET_UP = {
    "workload": {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [CLIENT]},
    "simulation": {"model": "llama-3.1-8b", "hardware": "h100", "replicas": 2},
}


def test_a_mapping_and_its_file_give_the_same_results(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(json.dumps(SET_UP), encoding="utf-8")
    assert emberkv.simulate(SET_UP).summary == emberkv.simulate(file).summary == emberkv.simulate(str(file)).summary


def test_settings_take_precedence_over_the_set_up() -> None:
    changed = emberkv.simulate(SET_UP, replicas=3, prefix_caching=False)
    assert (emberkv.simulate(SET_UP).config.replicas, changed.config.replicas) == (2, 3)
    assert changed.summary["prefix_caching"]["token_hit_rate"] == 0


def test_a_row_for_each_request_and_the_progress_are_given(tmp_path: Path) -> None:
    done: list[int] = []
    results = emberkv.simulate(SET_UP, csv=tmp_path / "rows.csv", progress=lambda count, _: done.append(count))
    rows = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 12 == 1 + results.summary["requests"]["completed"]
    assert done == sorted(done)


def test_the_garbage_collector_runs_less_often_until_the_simulation_ends_or_fails() -> None:
    usual, seen = gc.get_threshold(), list[int]()
    many = {**SET_UP, "workload": {**SET_UP["workload"], "sessions": 40}}

    def see(count: int, _: float) -> None:
        seen.append(gc.get_threshold()[0])
        if count > 100:
            raise OverflowError

    emberkv.simulate(many, progress=see)
    assert (seen, gc.get_threshold()) == ([COLLECT_AFTER], usual)
    with pytest.raises(OverflowError):
        emberkv.simulate({**many, "workload": {**many["workload"], "sessions": 80}}, progress=see)
    assert gc.get_threshold() == usual


def test_simulations_that_overlap_leave_the_garbage_collector_as_it_was() -> None:
    usual, inner_runs, outer_ended = gc.get_threshold(), Event(), Event()
    many = {**SET_UP, "workload": {**SET_UP["workload"], "sessions": 40}}

    def wait_for_outer(*_: object) -> None:
        inner_runs.set()
        assert outer_ended.wait(DEADLINE)

    inner = Thread(target=lambda: emberkv.simulate(many, progress=wait_for_outer))

    def overlap(*_: object) -> None:
        inner.start()
        assert inner_runs.wait(DEADLINE)

    emberkv.simulate(many, progress=overlap)
    assert gc.get_threshold()[0] == COLLECT_AFTER
    outer_ended.set()
    inner.join(DEADLINE)
    assert gc.get_threshold() == usual


def test_a_plan_says_which_set_up_to_get() -> None:
    plan = emberkv.plan(SET_UP, price_per_hour=3.5, requests=12)
    assert plan.get is not None
    assert (plan.get.replicas, plan.get.tier) == (1, None)
    assert "$3.50 an hour" in " ".join(get_this(plan))


@pytest.mark.parametrize("function", [emberkv.simulate, emberkv.plan])
def test_what_cannot_be_computed_is_refused_by_name(function: object, tmp_path: Path) -> None:
    assert callable(function)
    with pytest.raises(ConfigError, match="colour"):
        function(SET_UP, colour="red")
    with pytest.raises(ConfigError, match="workloads"):
        function({"workloads": {}})
    with pytest.raises(WorkloadError, match="the mapping: has neither workload nor trace"):
        function({"simulation": {}})
    with pytest.raises(WorkloadError, match=r"nothing\.jsonl"):
        function(tmp_path / "nothing.jsonl")
