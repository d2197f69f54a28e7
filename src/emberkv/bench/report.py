"""The board: a run's summary as a table for the terminal."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from emberkv.bench.runner import Phase
from emberkv.bench.summary import Spread, Summary

TIMES = (
    ("TTFT cold", Phase.COLD.value),
    ("TTFT warm", "warm"),
    ("  first turns, shared prompt warm", Phase.FIRST_TURN.value),
    ("  follow-up turns", Phase.FOLLOW_UP.value),
)


def _milliseconds(values: Spread | None) -> list[str]:
    if values is None:
        return ["0", "-", "-", "-"]
    return [str(values.n), *(f"{seconds * 1e3:,.1f}" for seconds in (values.p50, values.p90, values.p99))]


def _facts(summary: Summary) -> list[tuple[str, str]]:
    rate, share = summary.output_tokens_per_second, summary.cached_share
    cached = "not reported"
    if share is not None:
        cached = f"{share:.1%} ({summary.cached_tokens:,} of {summary.prompt_tokens:,} prompt tokens)"
    return [
        ("Output tokens/s", "-" if rate is None else f"{rate:,.1f}"),
        ("Total time", f"{summary.total:,.2f} s"),
        ("Cached share", cached),
        ("Requests", f"{summary.requests} ({summary.failed} failed, {summary.not_sent} not sent)"),
    ]


def _remarks(summary: Summary) -> list[str]:
    remarks = []
    if summary.textless:
        remarks.append(f"{summary.textless} answers had no visible text; their TTFT is the time to their finish.")
    if summary.uncounted:
        remarks.append(f"{summary.uncounted} answers came without token counts; pieces of text were counted.")
    return remarks


def render(summary: Summary, title: str) -> Group:
    times = Table(title=Text(title), title_justify="left")
    times.add_column("milliseconds")
    for heading in ("n", "p50", "p90", "p99"):
        times.add_column(heading, justify="right")
    for label, phase in TIMES:
        times.add_row(label, *_milliseconds(summary.ttft[phase]))
    times.add_row("Inter-token latency", *_milliseconds(summary.inter_token))
    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(summary):
        facts.add_row(label, value)
    return Group(times, facts, *(Text(remark) for remark in _remarks(summary)))


def print_errors(console: Console, errors: list[str]) -> None:
    """Each distinct error once, with how often it came, most frequent first."""
    for error in sorted(set(errors), key=lambda e: (-errors.count(e), e)):
        console.print(f"{errors.count(error)} x {error}", style="red", markup=False, soft_wrap=True)
