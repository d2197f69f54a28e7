"""The simulate command: what a cache, a machine or a policy is worth."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from emberkv.cli import simulate_tables as tables
from emberkv.cli.command import check_outputs, confirm_written, errors_reported, write_text
from emberkv.cli.simulate_tables import ListHardware, ListModels
from emberkv.cluster.decision_log import read_decisions, replay
from emberkv.cluster.routing import ROUTER_NAMES
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import ConfigError
from emberkv.sim.compare import compare, same_workload
from emberkv.sim.config import SimulationConfig, with_changes
from emberkv.sim.inputs import Workload, open_set_up, required
from emberkv.sim.run import Results
from emberkv.sim.run import run_simulation as carry_out


def simulate(
    workload: Annotated[Path | None, typer.Argument(help="A trace, or a YAML file with a workload.")] = None,
    *,
    model: Annotated[str | None, typer.Option(help="A model's name, its config.json, or a folder with one.")] = None,
    hardware: Annotated[str | None, typer.Option(help="A profile's name, or its YAML file.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="Devices of a replica.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Each with a scheduler and a pool of its own.")] = None,
    routing: Annotated[str | None, typer.Option(help=f"One of {', '.join(ROUTER_NAMES)}.")] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="Of each replica; default: what fits its memory.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens; default: the trace's own, or 16.")] = None,
    hit_unit: Annotated[
        int | None, typer.Option(min=1, help="Tokens to which hits are rounded down; default: a block; 1: not at all.")
    ] = None,
    eviction: Annotated[str | None, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}.")] = None,
    prefix_caching: Annotated[bool | None, typer.Option(help="Whether to reuse anything.")] = None,
    cache_only: Annotated[bool, typer.Option("--cache-only", help="No time: hits by capacity alone.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the generated workload, routing and outages.")] = None,
    warm_up: Annotated[
        float | None, typer.Option(min=0, help="Seconds from the start; results leave out what arrives in them.")
    ] = None,
    stop_at: Annotated[float | None, typer.Option(min=0, help="Virtual seconds at which the simulation ends.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Writes a row for each request.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Writes all figures as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Writes one HTML page with plots.")] = None,
    record_decisions: Annotated[
        Path | None, typer.Option(help="Writes a line of JSON for each routing decision, with all it was made from.")
    ] = None,
    replay_decisions: Annotated[
        Path | None, typer.Option(help="Makes recorded routing decisions again, by --routing or as recorded.")
    ] = None,
    compare_files: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="Two YAML files, side by side on the same requests.")
    ] = None,
    list_models: ListModels = False,
    list_hardware: ListHardware = False,
) -> None:
    """Replay a workload through the scheduler, cache and router that serve, in virtual time.

    A YAML file can say all that the options say, under the key simulation; options take precedence.

    An interrupt (Ctrl-C) ends it early and writes what there is.
    """
    changes = {
        "model": model, "hardware": hardware, "tensor_parallel": tensor_parallel, "replicas": replicas,
        "routing": routing, "kv_blocks": kv_blocks, "block_size": block_size, "eviction": eviction,
        "hit_unit": hit_unit,
        "prefix_caching": prefix_caching, "cache_only": cache_only or None, "seed": seed, "warm_up": warm_up,
        "stop_at": stop_at,
    }  # fmt: skip
    with errors_reported() as errors:
        check_outputs(csv=csv_file, summary=summary, report=report, record_decisions=record_decisions)
        if replay_decisions is not None:
            _replay(replay_decisions, routing, alone=workload is None and compare_files is None)
        elif compare_files is not None:
            if csv_file is not None or summary is not None or record_decisions is not None:
                raise ConfigError(
                    "--compare writes no --csv, --summary or --record-decisions; run each set-up by itself for them"
                )
            _write(_compare(workload, compare_files, changes, errors), None, report, errors)
            confirm_written(errors, [report])
        elif workload is None:
            raise ConfigError("give a workload: a trace, or a YAML file")
        else:
            results = _one(workload, changes, errors, csv_file=csv_file, decisions_file=record_decisions)
            _write({workload.name: results}, summary, report, errors)
            confirm_written(errors, [csv_file, record_decisions, summary, report])


def _replay(recording: Path, routing: str | None, *, alone: bool) -> None:
    """Print what routing decides of what was recorded. alone: whether no workload was given beside it."""
    if not alone:
        raise ConfigError("--replay-decisions takes no workload: the recording has all that routing decides from")
    Console().print(tables.replayed(replay(read_decisions(recording), routing), recording.name))


def _one(
    workload: Path, changes: dict[str, Any], errors: Console, *, csv_file: Path | None, decisions_file: Path | None
) -> Results:
    """Simulate one set-up, and print what came of it."""
    set_up, requests = open_set_up(workload)
    results = _carry_out(
        with_changes(set_up.simulation, changes),
        _seeded(required(requests, workload), changes["seed"]),
        errors,
        csv_file=csv_file,
        decisions_file=decisions_file,
    )
    console = Console()
    for sentence in tables.heading(results):
        console.print(sentence, markup=False, highlight=False)
    console.print(tables.summary(results, workload.name))
    for sentence in tables.warnings(results):
        errors.print(sentence, style="yellow")
    return results


def _compare(
    workload: Path | None, files: tuple[Path, Path], changes: dict[str, Any], errors: Console
) -> dict[str, Results]:
    """The results by file."""
    (left, ours), (right, theirs) = (open_set_up(path) for path in files)
    requests = required(open_set_up(workload)[1], workload) if workload else same_workload(ours, theirs)
    requests = _seeded(requests, changes["seed"])
    results = [
        _carry_out(with_changes(each.simulation, changes), requests, errors, keep_ids=True) for each in (left, right)
    ]
    for path, each in zip(files, results, strict=True):
        for sentence in (*tables.heading(each), *tables.warnings(each)):
            Console().print(f"{path.name}: {sentence}", markup=False, highlight=False)
    Console().print(tables.comparison(compare(*results), *(path.name for path in files)))
    names = [path.name if files[0].name != files[1].name else str(path) for path in files]
    return dict(zip(names, results, strict=True))


def _seeded(workload: Workload, seed: int | None) -> Workload:
    return workload if seed is None else workload.with_seed(seed)


def _carry_out(config: SimulationConfig, workload: Workload, errors: Console, **options: Any) -> Results:
    """With a line that shows how far it is, on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("simulating")

        def progress(done: int, now: float) -> None:
            bar.update(task, description=f"{done:,} requests, {now:,.0f} s simulated")

        results = carry_out(config, workload, progress=progress, **options)
    if results.ending.interrupted:
        errors.print(f"Interrupted at {results.ending.at:,.1f} s; these are the results so far.", style="yellow")
    return results


def _write(results: dict[str, Results], summary: Path | None, report: Path | None, errors: Console) -> None:
    if summary is not None:
        (only,) = results.values()
        write_text(summary, json.dumps(only.summary, indent=1) + "\n")
    if report is not None:
        from emberkv.sim.report import render_report  # noqa: PLC0415 - matplotlib loads slowly, and is rarely needed

        with errors.status("plotting: hit rate against capacity takes the longest"):
            write_text(report, render_report(results, made=datetime.now(UTC)))
