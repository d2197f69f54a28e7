"""A run's summary: percentiles, rates and shares of its records, as JSON and as tables for the terminal."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from emberkv.bench.client import TimedAnswer
from emberkv.bench.runner import Phase, RequestRecord


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of ``n`` values, in their unit.

    >>> percentiles([1.0, 2.0, 3.0]).p50, percentiles([])
    (2.0, None)
    """

    n: int
    p50: float
    p90: float
    p99: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of sorted, non-empty values, interpolated linearly between neighbours."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Percentiles(len(ordered), *(percentile(ordered, q) for q in (0.5, 0.9, 0.99)))


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in seconds. Failed requests count in ``failed`` and ``not_sent`` only.

    ttft: by phase; ``warm`` is first and follow-up turns together.
    inter_token: between pieces of text; a server that sends several tokens in one piece is seen at that pace.
    total: from the first request sent to the last answer's end.
    cached_tokens: None when no answer reports them; else answers that do not count as 0, since some servers leave
        the field out of a cold answer.
    cached_share: cached_tokens over prompt_tokens.
    textless: answers without visible text, whose TTFT is the time to their finish reason.
    uncounted: answers whose output tokens the server did not report, so that pieces were counted instead.

    >>> summary = summarize([])
    >>> summary.requests, summary.total, summary.cached_share
    (0, 0.0, None)
    """

    requests: int
    failed: int
    not_sent: int
    ttft: dict[str, Percentiles | None]
    inter_token: Percentiles | None
    output_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    cached_share: float | None
    total: float
    output_tokens_per_second: float | None
    textless: int
    uncounted: int


def summarize(records: Sequence[RequestRecord]) -> Summary:
    sent = [record.answer for record in records if record.answer]
    good = [answer for answer in sent if answer.error is None]
    prompt, cached = _tokens(good)
    output = sum(answer.output_tokens for answer in good)
    total = max(a.ended for a in sent) - min(a.sent for a in sent) if sent else 0.0
    return Summary(
        requests=len(records),
        failed=len(sent) - len(good),
        not_sent=len(records) - len(sent),
        ttft=_ttft(records),
        inter_token=percentiles([gap for answer in good for gap in answer.gaps]),
        output_tokens=output,
        prompt_tokens=prompt,
        cached_tokens=cached,
        cached_share=cached / prompt if cached is not None and prompt else None,
        total=total,
        output_tokens_per_second=output / total if total > 0 else None,
        textless=sum(not answer.piece_times for answer in good),
        uncounted=sum(answer.usage is None or answer.usage.completion_tokens is None for answer in good),
    )


def _ttft(records: Sequence[RequestRecord]) -> dict[str, Percentiles | None]:
    times: dict[Phase, list[float]] = {phase: [] for phase in Phase}
    for record in records:
        if record.answer and record.error is None and record.answer.ttft is not None:
            times[record.phase].append(record.answer.ttft)
    by_phase = {phase.value: percentiles(times[phase]) for phase in Phase}
    return by_phase | {"warm": percentiles(times[Phase.FIRST_TURN] + times[Phase.FOLLOW_UP])}


def _tokens(answers: Sequence[TimedAnswer]) -> tuple[int | None, int | None]:
    """Prompt tokens and cached tokens, each None when no answer reports it."""
    usages = [answer.usage for answer in answers if answer.usage]
    prompts = [usage.prompt_tokens for usage in usages if usage.prompt_tokens is not None]
    cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
    return sum(prompts) if prompts else None, sum(cached) if cached else None


def row(record: RequestRecord) -> dict[str, Any]:
    """One request as JSON; times in seconds, ``sent`` by the run's clock."""
    answer, usage = record.answer, record.answer.usage if record.answer else None
    return {
        "session": record.session,
        "turn": record.turn,
        "phase": record.phase.value,
        "error": record.error,
        "sent": answer.sent if answer else None,
        "ttft": answer.ttft if answer else None,
        "total": answer.ended - answer.sent if answer else None,
        "gaps": answer.gaps if answer else [],
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "cached_tokens": usage.cached_tokens if usage else None,
        "output_tokens": answer.output_tokens if answer else None,
        "text": answer.text if answer else None,
    }


def as_json(records: Sequence[RequestRecord], summary: Summary) -> dict[str, Any]:
    return {"summary": asdict(summary), "requests": [row(record) for record in records]}


TIMES = (
    ("TTFT cold", Phase.COLD.value),
    ("TTFT warm", "warm"),
    ("  first turns, shared prompt warm", Phase.FIRST_TURN.value),
    ("  follow-up turns", Phase.FOLLOW_UP.value),
)


def _milliseconds(values: Percentiles | None) -> list[str]:
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
