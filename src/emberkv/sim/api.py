"""The simulator and the planner as Python functions."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emberkv.sim.config import SimulationConfig, parse_set_up, with_changes
from emberkv.sim.inputs import Workload, open_set_up, required, with_workload
from emberkv.sim.planner import SIMULATED, Plan, Planner
from emberkv.sim.run import Results, no_progress
from emberkv.sim.run import simulate as run_simulation
from emberkv.sim.simulator import Progress

WorkloadSource = str | os.PathLike[str] | Mapping[str, Any]
"""A trace's file, a YAML file, or what such a YAML file holds: ``workload`` or ``trace``, and ``simulation``."""


def simulate(
    workload: WorkloadSource,
    *,
    csv: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Results:
    """Replay a workload through the scheduler, cache and router that serve, in virtual time.

    settings: keys of ``simulation`` in docs/simulation.md, such as model, hardware, replicas, routing, kv_blocks or
    cache_only; they take precedence over the workload's own. csv: a file that gets a row for each request. progress:
    called with the number of requests done and the virtual time in seconds.

    Raises ConfigError for an unknown setting or one that cannot work, WorkloadError for a workload that cannot be read.

    >>> import emberkv
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> results = emberkv.simulate({"workload": chat}, model="llama-3.1-8b", hardware="h100", hit_unit=1)
    >>> results.summary["requests"]["completed"], round(results.summary["prefix_caching"]["token_hit_rate"], 3)
    (12, 0.538)
    """
    config, requests = _opened(workload, settings)
    return run_simulation(
        config, requests, csv_file=None if csv is None else Path(csv), progress=progress or no_progress
    )


def plan(
    workload: WorkloadSource,
    *,
    replicas: int | None = None,
    capture: float = 0.9,
    simulate: bool = True,
    requests: int = SIMULATED,
    price_per_hour: float | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Plan:
    """Say what a cache of each size would find of a workload, and which set-up to get.

    replicas: by default as few as serve. capture: the share of what is reusable that the recommended size finds.
    simulate: whether set-ups are simulated, with the first ``requests`` of the workload, besides the formulas.
    price_per_hour: of one device, in dollars. progress: called with what is done next. settings and errors are those of
    `simulate`. `emberkv.sim.plan_words.get_this` puts the result into sentences.

    >>> import emberkv
    >>> from emberkv.sim.plan_words import get_this
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> found = emberkv.plan({"workload": chat}, model="llama-3.1-8b", hardware="h100")
    >>> get_this(found)[0]
    'Get 1 replica on 1 x H100 SXM, with 55.5 GiB of KV memory.'
    """
    config, found = _opened(workload, settings)
    planner = Planner(found, config, wanted=capture, simulated=requests, on_progress=progress or (lambda what: None))
    return planner.plan(replicas=replicas, simulate=simulate, price_per_hour=price_per_hour)


def _opened(workload: WorkloadSource, settings: Mapping[str, Any]) -> tuple[SimulationConfig, Workload]:
    if isinstance(workload, Mapping):
        set_up, requests = with_workload(parse_set_up(workload, Path()), Path())
    else:
        set_up, requests = open_set_up(Path(workload))
    named = "the mapping" if isinstance(workload, Mapping) else workload
    return with_changes(set_up.simulation, settings), required(requests, named)
