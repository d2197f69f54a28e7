"""Tables of the simulate and plan commands: one simulation, two side by side, and the models and machines known."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emberkv.cluster.decision_log import Replayed
from emberkv.sim.compare import Comparison
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share, format_size
from emberkv.sim.hardware import load_profile, profile_names
from emberkv.sim.model_spec import load_spec, model_names
from emberkv.sim.run import Results
from emberkv.sim.summary import rejected_sentence


def heading(results: Results) -> Iterator[str]:
    """What was computed, and what of it was a default; a sentence each."""
    yield results.about.sentence
    defaults = results.about.defaults_sentence
    if defaults is not None:
        yield defaults
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


def summary(results: Results, title: str) -> Table:
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


def comparison(found: Comparison, left: str, right: str) -> Table:
    table = Table(title=Text(f"Over the {found.both:,} requests that both completed"), title_justify="left")
    table.add_column("")
    for name in (left, right, "change"):
        table.add_column(Text(name), justify="right")
    for line in found.lines:
        table.add_row(line.label, *line.cells)
    return table


def replayed(found: Replayed, title: str) -> Table:
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
