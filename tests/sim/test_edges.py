"""Absurd values of every key of a set-up, a workload and a trace's line: an error in one sentence, or a result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emberkv.errors import EmberError
from emberkv.sim.config import SetUp, SimulationConfig, TraceConfig, Workload, open_set_up
from emberkv.sim.run import run_simulation
from emberkv.workload.ember_trace import TraceLine
from emberkv.workload.spec import GeneratedWorkload, Profile
from tests.workload.build import CHAT, jsonl

EDGES: list[Any] = [
    0, -1, 1, 5e-324, 1e-9, 1e308, float("nan"), float("inf"), 10**18, 10**30, -(10**30), True, "", "x", "\x00", None,
    [], {}, [[]], {"kind": "fixed", "value": 1e18}, {"kind": "geometric", "mean": 1e12},
    {"kind": "poisson", "rate": 9.0}, {"kind": "lognormal", "median": 5e-324, "p90": 1e12},
    {"kind": "constant", "rate": 1e-9},
]  # fmt: skip

SIMULATION = {"rates": {"per_prefill_token": 1e-4, "per_decode_token": 1e-3}, "kv_blocks": 50, "stop_at": 1.0}
WORKLOAD = {"seed": 1, "sessions": 2, "arrivals": {"kind": "constant", "rate": 2}, "clients": [CHAT]}
LINE = {"request": "a", "arrival": 0.0, "prompt_tokens": 20, "output_tokens": 4}


def run(path: Path) -> None:
    set_up, workload = open_set_up(path)
    assert workload is not None
    run_simulation(set_up.simulation, workload)


def of_simulation(folder: Path, key: str, value: Any) -> None:
    data = {"workload": WORKLOAD, "simulation": {**SIMULATION, key: value}}
    _run(data, folder)


def of_workload(folder: Path, key: str, value: Any) -> None:
    _run({"workload": {**WORKLOAD, key: value}, "simulation": SIMULATION}, folder)


def of_client(folder: Path, key: str, value: Any) -> None:
    _run({"workload": {**WORKLOAD, "clients": [{**CHAT, key: value}]}, "simulation": SIMULATION}, folder)


def of_line(folder: Path, key: str, value: Any) -> None:
    path = jsonl(folder / "t.jsonl", '{"emberkv_trace": 1}', {**LINE, key: value})
    set_up = SetUp(trace=TraceConfig(path=path.name))
    run_simulation(SimulationConfig(**SIMULATION), Workload(None, set_up.trace, folder))


def _run(data: dict[str, Any], folder: Path) -> None:
    path = folder / "a.yaml"  # JSON is YAML, apart from these two numbers
    path.write_text(json.dumps(data).replace("NaN", ".nan").replace("Infinity", ".inf"))
    run(path)


@pytest.mark.parametrize(
    ("of", "keys"),
    [(of_simulation, SimulationConfig.model_fields), (of_workload, GeneratedWorkload.model_fields),
     (of_client, Profile.model_fields), (of_line, TraceLine.model_fields)],
    ids=["simulation", "workload", "client", "line"],
)  # fmt: skip
def test_absurd_values_are_told_in_one_sentence(
    tmp_path: Path, of: Callable[[Path, str, Any], None], keys: dict[str, Any]
) -> None:
    for key in keys:
        for value in EDGES:
            said = _said(of, tmp_path, key, value)
            assert "\n" not in said, (key, value)
            assert len(said) < 1000, (key, value)


def _said(of: Callable[[Path, str, Any], None], folder: Path, key: str, value: Any) -> str:
    """The error's sentence; nothing of a run that ends."""
    try:
        of(folder, key, value)
    except EmberError as error:
        return str(error)
    return ""
