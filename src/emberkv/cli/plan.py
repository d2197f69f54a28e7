"""The plan command: how much cache a workload is worth, and on how many machines."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emberkv.cli.telling import errors_told
from emberkv.cluster.routing import ROUTER_NAMES
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import ConfigError
from emberkv.sim.config import with_changes
from emberkv.sim.inputs import open_set_up, required
from emberkv.sim.plan_words import recommendation, seconds_words, size_words, tier_words
from emberkv.sim.planner import Plan, Planner

_BY_FORMULA = "By formula: share found, TTFT without queueing, most requests a second."
_SIMULATED = f"{_BY_FORMULA}\n*Simulated, with queueing: share found, TTFT."


def plan(
    workload: Annotated[Path, typer.Argument(help="A trace, or a YAML file with a workload or a trace.")],
    *,
    model: Annotated[str | None, typer.Option(help="A model's name, its config.json, or a folder with one.")] = None,
    hardware: Annotated[str | None, typer.Option(help="A profile's name, or its YAML file.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="Devices of a replica.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="How many; default: as many as are needed.")] = None,
    routing: Annotated[str | None, typer.Option(help=f"Of the simulated; {', '.join(ROUTER_NAMES)}.")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens; default: the trace's own, or 16.")] = None,
    eviction: Annotated[str | None, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}.")] = None,
    capture: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of what is reusable to plan for.")] = 0.9,
    simulate: Annotated[bool, typer.Option(help="Whether to simulate a few set-ups besides the formulas.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes all figures as JSON.")] = None,
) -> None:
    """Say what a cache of each size would find of a workload, what that does to waiting times, and what to get.

    Hit rates come from the workload alone: for LRU exactly, for other policies by a replay, of a sample if it is long.

    Times come from formulas for every set-up, and for a few of them from the simulator.
    """
    changes = {
        "model": model, "hardware": hardware, "tensor_parallel": tensor_parallel, "block_size": block_size,
        "eviction": eviction, "routing": routing,
    }  # fmt: skip
    with errors_told() as errors:
        set_up, requests = open_set_up(workload)
        config = with_changes(set_up.simulation, changes)
        with errors.status("planning") as status:
            planner = Planner(required(requests, workload), config, wanted=capture)
            simulating = (lambda what: status.update(f"simulating {what}")) if simulate else None
            found = planner.plan(replicas=replicas, simulating=simulating)
        if json_file is not None:
            _write(found, json_file)
        console = Console()
        if found.unlimited:
            console.print(_sizes(found))
        console.print(_set_ups(found))
        console.print(_SIMULATED if _is_simulated(found) else _BY_FORMULA, highlight=False)
        for sentence in recommendation(found):
            console.print(sentence, markup=False, highlight=False)


def _write(found: Plan, path: Path) -> None:
    text = json.dumps({**asdict(found), "recommendation": recommendation(found)}, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _sizes(found: Plan) -> Table:
    exact = "exact" if found.error is None else f"sampled, at most about {found.error:.3f} off"
    table = Table(title=Text(f"Share of prompt tokens found, by cache size ({exact})"), title_justify="left")
    for heading in ("size", f"blocks of {found.block_size}", found.eviction, "best possible", "of what is reusable"):
        table.add_column(heading, justify="right")
    for point in found.sizes:
        style = "bold" if point == found.recommended else None
        share = f"{point.hit_rate / found.unlimited:.1%}"
        cells = (size_words(point.bytes), f"{point.blocks:,}", f"{point.hit_rate:.4f}", f"{point.best_possible:.4f}")
        table.add_row(*cells, share, style=style)
    table.add_row("unlimited", "", f"{found.unlimited:.4f}", f"{found.unlimited:.4f}", "100.0%")
    return table


def _is_simulated(found: Plan) -> bool:
    return any(point.simulated is not None for point in found.set_ups)


def _set_ups(found: Plan) -> Table:
    title = f"Set-ups, each replica with {size_words(found.pool_bytes)} of KV memory"
    table = Table(title=Text(title), title_justify="left")
    simulated = ("found*", "mean*", "p99*") if _is_simulated(found) else ()
    for heading in ("replicas", "each and", "found", "TTFT", "req/s", *simulated):
        table.add_column(heading, justify="right")
    for point in found.set_ups:
        beside = f"{size_words(point.tier_bytes)} {tier_words(point.tier)}" if point.tier else ""
        formula = (f"{point.hit_rate:.4f}", seconds_words(point.first_token), f"{point.most_requests_per_second:,.3g}")
        ran = point.simulated
        cells = (f"{ran.hit_rate:.4f}", seconds_words(ran.mean_ttft), seconds_words(ran.p99_ttft)) if ran else ()
        table.add_row(f"{point.replicas:,}", beside, *formula, *cells)
    return table
