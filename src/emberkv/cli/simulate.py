"""The simulate command: what a cache, a machine or a policy is worth, and its tables."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import check_outputs, confirm_written, errors_reported, write_text
from emberkv.cluster.decision_log import Replayed, read_decisions, replay
from emberkv.cluster.routing import ROUTER_NAMES
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import ConfigError
from emberkv.sim.config import SimulationConfig, Workload, open_set_up, required, with_changes
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share, format_size
from emberkv.sim.hardware import load_profile, profile_names
from emberkv.sim.model_spec import load_spec, model_names
from emberkv.sim.run import Comparison, Results, compare, same_workload
from emberkv.sim.run import run_simulation as carry_out
from emberkv.sim.summary import rejected_sentence


def _show_models(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("model", "parameters", "weights", "KV a token", "context")
    for name in model_names():
        spec = load_spec(name)
        table.add_row(
            name, f"{spec.parameters / 1e9:,.3g} B", f"{format_size(spec.weight_bytes)} {spec.weights_dtype}",
            format_size(spec.kv_bytes_per_token), f"{spec.context:,}",
        )  # fmt: skip
    Console().print(table)
    raise typer.Exit


def _show_hardware(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("hardware", "what", "memory", "bandwidth", "bf16")
    for name in profile_names():
        profile = load_profile(name)
        table.add_row(
            name, profile.name, f"{profile.memory_gib:g} GiB", f"{format_rate(profile.memory_gb_per_s)} GB/s",
            f"{format_rate(profile.flops('bf16') / 1e12)} TFLOPS",
        )  # fmt: skip
    Console().print(table)
    raise typer.Exit


ListModels = Annotated[
    bool, typer.Option("--list-models", callback=_show_models, is_eager=True, help="Show the models known by name.")
]
ListHardware = Annotated[
    bool, typer.Option("--list-hardware", callback=_show_hardware, is_eager=True, help="Show the profiles known.")
]


WorkloadFile = Annotated[Path | None, typer.Argument(help="A trace, or a YAML file with a workload.")]
Model = Annotated[str | None, typer.Option(help="A model's name, its config.json, or a folder with one.")]
Hardware = Annotated[str | None, typer.Option(help="A profile's name, or its YAML file.")]
TensorParallel = Annotated[int | None, typer.Option(min=1, help="Devices of a replica.")]
Replicas = Annotated[int | None, typer.Option(min=1, help="Each with a scheduler and a pool of its own.")]
Routing = Annotated[str | None, typer.Option(help=f"One of {', '.join(ROUTER_NAMES)}.")]
KvBlocks = Annotated[int | None, typer.Option(min=1, help="Of each replica; default: what fits its memory.")]
BlockSize = Annotated[int | None, typer.Option(min=1, help="Tokens; default: the trace's own, or 16.")]
HitUnit = Annotated[
    int | None, typer.Option(min=1, help="Tokens to which hits are rounded down; default: a block; 1: not at all.")
]
Eviction = Annotated[str | None, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}.")]
PrefixCaching = Annotated[bool | None, typer.Option(help="Whether to reuse anything.")]
CacheOnly = Annotated[bool, typer.Option("--cache-only", help="No time: hits by capacity alone.")]
Seed = Annotated[int | None, typer.Option(help="Of the generated workload, routing and outages.")]
WarmUp = Annotated[
    float | None, typer.Option(min=0, help="Seconds from the start; results leave out what arrives in them.")
]
StopAt = Annotated[float | None, typer.Option(min=0, help="Virtual seconds at which the simulation ends.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Writes a row for each request.")]
SummaryFile = Annotated[Path | None, typer.Option(help="Writes all figures as JSON.")]
ReportFile = Annotated[Path | None, typer.Option(help="Writes one HTML page with plots.")]
RecordDecisions = Annotated[
    Path | None, typer.Option(help="Writes a line of JSON for each routing decision, with all it was made from.")
]
ReplayDecisions = Annotated[
    Path | None, typer.Option(help="Makes recorded routing decisions again, by --routing or as recorded.")
]
CompareFiles = Annotated[
    tuple[Path, Path] | None, typer.Option("--compare", help="Two YAML files, side by side on the same requests.")
]


def simulate(
    workload: WorkloadFile = None,
    *,
    model: Model = None,
    hardware: Hardware = None,
    tensor_parallel: TensorParallel = None,
    replicas: Replicas = None,
    routing: Routing = None,
    kv_blocks: KvBlocks = None,
    block_size: BlockSize = None,
    hit_unit: HitUnit = None,
    eviction: Eviction = None,
    prefix_caching: PrefixCaching = None,
    cache_only: CacheOnly = False,
    seed: Seed = None,
    warm_up: WarmUp = None,
    stop_at: StopAt = None,
    csv_file: CsvFile = None,
    summary: SummaryFile = None,
    report: ReportFile = None,
    record_decisions: RecordDecisions = None,
    replay_decisions: ReplayDecisions = None,
    compare_files: CompareFiles = None,
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
        "hit_unit": hit_unit, "prefix_caching": prefix_caching, "cache_only": cache_only or None, "seed": seed,
        "warm_up": warm_up, "stop_at": stop_at,
    }  # fmt: skip
    with errors_reported() as errors:
        check_outputs(csv=csv_file, summary=summary, report=report, record_decisions=record_decisions)
        if replay_decisions is not None:
            _replay(replay_decisions, routing, alone=workload is None and compare_files is None)
            return
        if compare_files is not None:
            _refuse_with_compare(csv_file, summary, record_decisions)
            _write(_compare(workload, compare_files, changes, errors), None, report, errors)
        elif workload is None:
            raise ConfigError("give a workload: a trace, or a YAML file")
        else:
            results = _one(workload, changes, errors, csv_file=csv_file, decisions_file=record_decisions)
            _write({workload.name: results}, summary, report, errors)
        confirm_written(errors, [csv_file, record_decisions, summary, report])


def _refuse_with_compare(*files: Path | None) -> None:
    """Raises ConfigError where --compare comes with a file that only a single simulation writes."""
    if any(file is not None for file in files):
        raise ConfigError(
            "--compare writes no --csv, --summary or --record-decisions; run each set-up by itself for them"
        )


def _replay(recording: Path, routing: str | None, *, alone: bool) -> None:
    """Print what routing decides of what was recorded. alone: whether no workload was given beside it."""
    if not alone:
        raise ConfigError("--replay-decisions takes no workload: the recording has all that routing decides from")
    Console().print(replayed_table(replay(read_decisions(recording), routing), recording.name))


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
    for sentence in heading(results):
        console.print(sentence, markup=False, highlight=False)
    console.print(summary_table(results, workload.name))
    for sentence in warnings(results):
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
        for sentence in (*heading(each), *warnings(each)):
            Console().print(f"{path.name}: {sentence}", markup=False, highlight=False)
    Console().print(comparison_table(compare(*results), *(path.name for path in files)))
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


def heading(results: Results) -> Iterator[str]:
    """What was computed, and what of it was a default; a sentence each."""
    yield results.about.sentence
    defaults = results.about.defaults_sentence
    if defaults is not None:
        yield defaults
    if results.about.measured_sentence is not None:
        yield results.about.measured_sentence
    served = results.workload.served
    if served and "model" in results.about.defaults:
        yield f"The recording was served by {served}, whose shape is not known here: give --model with its config.json."


def warnings(results: Results) -> Iterator[str]:
    """What makes the figures worth little; a sentence each."""
    requests = results.summary["requests"]
    if results.load is not None and results.load.grows:
        yield results.load.sentence
    if requests["rejected"]:
        yield rejected_sentence(requests["rejected"], requests["total"])


def summary_table(results: Results, title: str) -> Table:
    found = results.summary
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for label, value in _rows(found, results.machine.block_bytes):
        table.add_row(label, value)
    return table


def _rows(found: dict[str, Any], block_bytes: int) -> list[tuple[str, str]]:
    caching, pace, requests = found["prefix_caching"], found["throughput"], found["requests"]
    apart = ", ".join(f"{requests[name]:,} {name}" for name in ("rejected", "failed", "unfinished") if requests[name])
    completed = f"{requests['completed']:,} completed"
    rows = [
        ("Requests", f"{completed}, {apart}; {format_share(found['success_rate'])} succeeded" if apart else completed),
        ("KV cache", _cache(found, block_bytes)),
        (
            "Hit rate",
            f"{format_share(caching['token_hit_rate'])} of prompt tokens ({caching['total_tokens_saved']:,} saved), "
            f"{format_share(caching['request_hit_rate'])} of requests found any",
        ),
    ]
    if "blocks" in found:
        blocks = found["blocks"]
        rows.append(("Blocks", f"{blocks['hits']:,} of {blocks['references']:,} found, {blocks['hit_rate']:.2%}"))
    if caching["conversational_requests"]:
        rows.append(("Later turns", f"{format_share(caching['conversational_token_hit_rate'])} of their prompt tokens"))
    rows += [
        (f"From {name}", f"{format_share(tier['hit_rate'])} of prompt tokens")
        for name, tier in found["tiers"].items()
        if len(found["tiers"]) > 1
    ]
    return [*rows, *_times(found, pace)]


def _cache(found: dict[str, Any], block_bytes: int) -> str:
    blocks = found["kv_blocks"]
    tokens = format_count(found["block_size"], "token")
    return f"{format_size(blocks * block_bytes)} a replica, {blocks:,} blocks of {tokens}"


def _times(found: dict[str, Any], pace: dict[str, float]) -> Iterator[tuple[str, str]]:
    for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("End to end", "e2e_latency_ms")):
        if found[name]:
            yield label, format_percentiles(found[name])
    if found["duration"]:
        rate = f"{format_rate(pace['requests_per_second'])} requests"
        rate += f" and {format_rate(pace['output_tokens_per_second'])} output tokens a second"
        yield "Throughput", f"{rate}, over {format_seconds(found['duration'])}"
    if found["utilisation"]:
        used = found["utilisation"]
        yield (
            "Utilisation",
            f"busy {format_share(used['compute'])} of the time; {format_share(used['kv_memory'])} of KV blocks held",
        )
    if found["slo"]:
        yield "SLO", f"attained by {format_share(found['slo']['all'])} of requests"
    yield "Preemptions", f"{found['preemptions']:,}"
    again = found["prefix_caching"]["tokens_recomputed"]
    if again:
        yield "Computed again", f"{again:,} prompt tokens, after preemptions or lost replicas"


def format_percentiles(of: dict[str, float]) -> str:
    """Of milliseconds."""
    return ", ".join(f"{name} {format_seconds(of[name] / 1e3)}" for name in ("mean", "p50", "p90", "p99"))


def comparison_table(found: Comparison, left: str, right: str) -> Table:
    table = Table(title=Text(f"Over the {found.both:,} requests that both completed"), title_justify="left")
    table.add_column("")
    for name in (left, right, "change"):
        table.add_column(Text(name), justify="right")
    for line in found.lines:
        table.add_row(line.label, *line.cells)
    return table


def replayed_table(found: Replayed, title: str) -> Table:
    """Recorded routing decisions that were made again."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_row("Decisions", f"{found.decisions:,}")
    first = "" if found.first_other is None else f"; the first other one is line {found.first_other:,}"
    table.add_row("As recorded", f"{format_share(found.same / max(1, found.decisions))} ({found.same:,}{first})")
    if found.expected is not None and found.recorded is not None:
        table.add_row(
            "Expected TTFT",
            f"mean {format_seconds(found.expected)}; of what was recorded {format_seconds(found.recorded)}",
        )
    table.add_row("Why", ", ".join(f"{reason} {count:,}" for reason, count in sorted(found.reasons.items())))
    return table
