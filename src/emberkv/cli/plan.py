"""The plan command: how much cache a workload is worth, on how many machines, and what to get."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import check_outputs, confirm_written, errors_reported, write_text
from emberkv.cli.simulate import BlockSize, Eviction, Hardware, ListHardware, ListModels, Model, TensorParallel
from emberkv.cluster.routing import ROUTER_NAMES
from emberkv.sim.config import SimulationConfig, open_set_up, required, with_changes
from emberkv.sim.formatting import format_rate, format_seconds, format_share, format_size, format_tier
from emberkv.sim.plan import Plan, SetUpPoint, format_price, get_this, recommendation
from emberkv.sim.planner import SIMULATED_REQUESTS, Planner

WorkloadFile = Annotated[Path, typer.Argument(help="A trace, or a YAML file with a workload or a trace.")]
Replicas = Annotated[int | None, typer.Option(min=1, help="How many; default: as few as serve.")]
Routing = Annotated[str | None, typer.Option(help=f"Of the simulated; {', '.join(ROUTER_NAMES)}.")]
TtftP99 = Annotated[
    float | None, typer.Option(min=0.001, help="Milliseconds to the first token that 99% of requests must keep.")
]
TpotP99 = Annotated[float | None, typer.Option(min=0.001, help="Milliseconds for each further token, likewise.")]
PricePerHour = Annotated[
    float | None, typer.Option(min=0.0, help="Dollars for one device; default: the profile's, if it has one.")
]
Capture = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of what is reusable to plan for.")]
Simulate = Annotated[bool, typer.Option(help="Whether to simulate set-ups besides the formulas.")]
Requests = Annotated[int, typer.Option(min=1, help="How many requests, from the first, are simulated.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Writes all figures as JSON.")]
ReportFile = Annotated[Path | None, typer.Option(help="Writes one HTML page that opens with the answer.")]


def plan(
    workload: WorkloadFile,
    *,
    model: Model = None,
    hardware: Hardware = None,
    tensor_parallel: TensorParallel = None,
    replicas: Replicas = None,
    routing: Routing = None,
    block_size: BlockSize = None,
    eviction: Eviction = None,
    ttft_p99: TtftP99 = None,
    tpot_p99: TpotP99 = None,
    price_per_hour: PricePerHour = None,
    capture: Capture = 0.9,
    simulate: Simulate = True,
    requests: Requests = SIMULATED_REQUESTS,
    json_file: JsonFile = None,
    report: ReportFile = None,
    list_models: ListModels = False,
    list_hardware: ListHardware = False,
) -> None:
    """Say what a cache of each size would find of a workload, what that does to waiting times, and what to get.

    Hit rates come from the workload alone: for LRU exactly, for other policies by a replay, of a sample if it is long.

    Times come from formulas for every set-up, and for a few of them from the simulator.

    It tries numbers of replicas until it has the fewest that serve, within --ttft-p99 and --tpot-p99 or the file's slo.
    """
    changes = {
        "model": model, "hardware": hardware, "tensor_parallel": tensor_parallel, "block_size": block_size,
        "eviction": eviction, "routing": routing,
    }  # fmt: skip
    with errors_reported() as errors:
        check_outputs(json=json_file, report=report)
        set_up, found_workload = open_set_up(workload)
        config = _with_targets(with_changes(set_up.simulation, changes), ttft_ms=ttft_p99, tpot_ms=tpot_p99)
        with errors.status("planning") as status:
            planner = Planner(
                required(found_workload, workload),
                config,
                wanted=capture,
                simulated=requests,
                on_progress=status.update,
            )
            found = planner.plan(replicas=replicas, simulate=simulate, price_per_hour=price_per_hour)
        _print(found, Console())
        _write(found, workload.name, json_file, report)
        confirm_written(errors, [json_file, report])


def _write(found: Plan, name: str, json_file: Path | None, report: Path | None) -> None:
    """name: the workload's, which the report's heading gives."""
    if json_file is not None:
        write_text(json_file, json.dumps(as_json(found), indent=1) + "\n")
    if report is not None:
        from emberkv.sim.plan_report import render_plan  # noqa: PLC0415 - matplotlib loads slowly

        write_text(report, render_plan(found, name, made=datetime.now(UTC)))


def _with_targets(config: SimulationConfig, **targets: float | None) -> SimulationConfig:
    given = {name: target for name, target in targets.items() if target is not None}
    return with_changes(config, {"slo": {**config.slo.model_dump(exclude_none=True), **given}}) if given else config


def as_json(found: Plan) -> dict[str, Any]:
    """All figures, the set-up to get, and both in sentences."""
    return {
        **asdict(found), "about": found.about.as_dict(), "slo": found.slo.model_dump(exclude_none=True),
        "get_this": get_this(found), "recommendation": recommendation(found),
    }  # fmt: skip


def _print(found: Plan, console: Console) -> None:
    for sentence in (
        f"One replica: {found.about.machine_text}, {found.about.memory_text}.",
        found.about.defaults_sentence,
        found.about.measured_sentence,
    ):
        if sentence is not None:
            console.print(sentence, markup=False, highlight=False)
    if found.unlimited:
        console.print(_sizes(found))
    console.print(_set_ups(found))
    for sentence in recommendation(found):
        console.print(sentence, markup=False, highlight=False)
    console.print()
    for number, sentence in enumerate(get_this(found)):
        console.print(sentence, markup=False, highlight=False, style=None if number else "bold")


def _sizes(found: Plan) -> Table:
    exact = "exact" if found.error is None else f"sampled, at most about {found.error:.3f} off"
    table = Table(title=Text(f"Share of prompt tokens found, by cache size ({exact})"), title_justify="left")
    for heading in (
        "",
        "size",
        f"blocks of {found.block_size}",
        found.eviction,
        "best possible",
        "of what is reusable",
    ):
        table.add_column(heading, justify="right")
    for point in found.sizes:
        mark = ">" if point == found.recommended_size else ""
        share = format_share(point.hit_rate / found.unlimited)
        cells = (format_size(point.bytes), f"{point.blocks:,}", format_share(point.hit_rate))
        table.add_row(mark, *cells, format_share(point.best_possible), share, style="bold" if mark else None)
    table.add_row("", "unlimited", "", format_share(found.unlimited), format_share(found.unlimited), "100.0%")
    return table


def _set_ups(found: Plan) -> Table:
    """By formula, or simulated where a set-up was; the one to get has a mark."""
    title = f"Set-ups, each replica with {format_size(found.pool_bytes)} of KV memory"
    table = Table(title=Text(title), title_justify="left")
    priced = found.price_per_hour is not None
    for heading in (
        "replicas",
        "and each",
        "by",
        "found",
        "TTFT",
        "p99",
        "req/s",
        *(("$/hour",) if priced else ()),
    ):
        table.add_column(heading, justify="right")
    for point in found.set_ups:
        chosen = point == found.get
        cells = _cells(point)
        price = (format_price(found, point) or "").removesuffix(" an hour").removeprefix("$")
        count = f"> {point.replicas:,}" if chosen else f"{point.replicas:,}"
        table.add_row(count, *cells, *((price,) if priced else ()), style="bold" if chosen else None)
    return table


def _cells(point: SetUpPoint) -> tuple[str, ...]:
    beside = f"{format_size(point.tier_bytes)} {format_tier(point.tier)}" if point.tier else ""
    ran = point.simulated
    if ran is None:
        times = (format_share(point.hit_rate), format_seconds(point.first_token), "")
        return (beside, "formula", *times, f"< {format_rate(point.most_requests_per_second)}")
    served = ran.load.served_per_second if ran.load else ran.requests_per_second
    times = (format_share(ran.hit_rate), format_seconds(ran.mean_ttft), format_seconds(ran.p99_ttft))
    return (beside, "sim", *times, format_rate(served))
