"""What the simulate command shows: one simulation's figures, or two side by side."""

from typing import Any

from rich.table import Table
from rich.text import Text

from emberkv.sim.compare import Comparison, Line
from emberkv.sim.run import Results


def summary(results: Results, title: str) -> Table:
    found = results.summary
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for label, value in _rows(found):
        table.add_row(label, value)
    return table


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    caching, pace = found["prefix_caching"], found["throughput"]
    requests = found["requests"]
    apart = ", ".join(f"{requests[name]:,} {name}" for name in ("rejected", "failed", "unfinished") if requests[name])
    rows = [
        ("Requests", f"{requests['completed']:,} completed{', ' + apart if apart else ''}"),
        ("KV cache", f"{found['kv_blocks']:,} blocks of {found['block_size']:,} tokens a replica"),
        ("Hit rate", f"{caching['overall_hit_rate']:.4f} of prompt tokens; {caching['total_tokens_saved']:,} saved"),
    ]
    if "blocks" in found:
        blocks = found["blocks"]
        rows.append(("Blocks", f"{blocks['hits']:,} of {blocks['references']:,} found, {blocks['hit_rate']:.4f}"))
    if caching["conversational_requests"]:
        rows.append(("Later turns", f"{caching['conversational_hit_rate']:.4f} of their prompt tokens"))
    rows += [
        (f"From {name}", f"{tier['hit_rate']:.4f} of prompt tokens")
        for name, tier in found["tiers"].items()
        if len(found["tiers"]) > 1
    ]
    for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("End to end", "e2e_latency_ms")):
        if found[name]:
            rows.append((label, _spread(found[name])))
    if found["duration"]:
        rate = f"{pace['requests_per_second']:,.2f} requests, {pace['output_tokens_per_second']:,.0f} output tokens"
        rows.append(("Throughput", f"{rate} a second, over {found['duration']:,.1f} s"))
    if found["slo"]:
        rows.append(("SLO", f"attained by {found['slo']['all']:.4f} of requests"))
    rows.append(("Preemptions", f"{found['preemptions']:,}"))
    return rows


def _spread(of: dict[str, float]) -> str:
    return f"mean {of['mean']:,.1f}, p50 {of['p50']:,.1f}, p90 {of['p90']:,.1f}, p99 {of['p99']:,.1f} ms"


def comparison(found: Comparison, left: str, right: str) -> Table:
    table = Table(title=Text(f"Over the {found.both:,} requests that both completed"), title_justify="left")
    table.add_column("")
    for name in (left, right, "change"):
        table.add_column(Text(name), justify="right")
    for line in found.lines:
        table.add_row(f"{line.name}{', ' + line.unit if line.unit else ''}", *_cells(line))
    return table


def _cells(line: Line) -> list[str]:
    values = ["" if value is None else f"{value:,.4g}" for value in (line.left, line.right)]
    return [*values, "" if line.change is None else f"{line.change:+.1%}"]
