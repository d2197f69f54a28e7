"""The figures of a report: plots of one run, or of several on equal axes, each with a sentence on what it shows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emberkv.sim.curves import CapacityCurve
from emberkv.sim.formatting import format_count, format_seconds, format_share
from emberkv.sim.hardware import GIB
from emberkv.sim.outcome import Row, Rows, Status
from emberkv.sim.plots import Axis, Line, bar_plot, line_plot
from emberkv.sim.run import Results
from emberkv.sim.summary import percentile, ratio
from emberkv.sim.timing import NANOSECONDS

BINS = 60
FEWEST_IN_BIN = 5
"""Requests that a stretch of time must have; a stretch with fewer is joined to the next."""

QUANTILES = 200


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with a sentence on what it shows. svg: None where there is nothing to draw; words then say why.

    >>> Figure("Memory by tier", "No time was simulated.", svg=None).title
    'Memory by tier'
    """

    title: str
    words: str
    svg: str | None


@dataclass(frozen=True, slots=True)
class _ShownRun:
    """One run in a figure. name: empty where there is only one. completed: in the order of arrival."""

    name: str
    color: int
    results: Results
    curve: CapacityCurve | None
    completed: Sequence[Row]

    def label(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text

    def line(self, text: str, x: Sequence[float], y: Sequence[float | None], kind: int) -> Line:
        """kind: of the line among those of its run. Runs differ in colour and kinds in dash; of one run, both do."""
        return Line(self.label(text), x, y, self.color if self.name else kind, kind)


def figures_of(runs: Mapping[str, Results], curves: Sequence[CapacityCurve | None]) -> list[Figure]:
    """The figures of a report: the same ones in the same order, for one run or several."""
    shown = []
    for number, ((name, results), curve) in enumerate(zip(runs.items(), curves, strict=True)):
        completed = sorted((row for row in results.rows if row.status is Status.COMPLETED), key=lambda row: row.arrival)
        shown.append(_ShownRun(name if len(runs) > 1 else "", number, results, curve, completed))
    return [
        _hit_rate_over_time(shown),
        _ttft_over_time(shown),
        _ttft_distribution(shown),
        _memory(shown),
        _load(shown),
        _hit_rate_by_capacity(shown),
    ]


def _words(shown: Sequence[_ShownRun], of: Callable[[_ShownRun], str]) -> str:
    return "\n".join(run.label(of(run)) for run in shown)


def _binned(rows: Sequence[Row], value: Callable[[Sequence[Row]], float]) -> tuple[list[float], list[float]]:
    """A value for the rows that arrive in each of `BINS` stretches of time, at their mean time. Short ones join."""
    last = max(1, rows[-1].arrival)
    times, values = [], []
    begin = 0
    for end, row in enumerate(rows):
        following = rows[end + 1] if end + 1 < len(rows) else None
        same = following is not None and following.arrival * BINS // last == row.arrival * BINS // last
        few = following is not None and end + 1 - begin < FEWEST_IN_BIN
        if not (same or few):
            some = rows[begin : end + 1]
            times.append(sum(each.arrival for each in some) / len(some) / NANOSECONDS)
            values.append(value(some))
            begin = end + 1
    return times, values


def _hit_rate(rows: Iterable[Row]) -> float:
    found = list(rows)
    return ratio(sum(row.cached_tokens for row in found), sum(row.prompt_tokens for row in found))


def _hit_rate_over_time(shown: Sequence[_ShownRun]) -> Figure:
    title = "Hit rate over time"
    drawn = [run for run in shown if run.completed]
    if not drawn:
        return Figure(title, "No request completed.", None)

    def words_of(run: _ShownRun) -> str:
        tenth = max(1, len(run.completed) // 10)
        return (
            f"Of the prompt tokens of the first tenth of requests, {format_share(_hit_rate(run.completed[:tenth]))} "
            f"were found in the cache, of the last tenth {format_share(_hit_rate(run.completed[-tenth:]))}; "
            f"{format_share(_hit_rate(run.completed))} in all."
        )

    words = _words(drawn, words_of)
    lines = [run.line("hit rate", *_binned(run.completed, _hit_rate), 0) for run in drawn]
    axes = Axis("arrival, s", start=0), Axis("share of prompt tokens", share=True, start=0)
    return Figure(title, words, line_plot("hits", words, *axes, lines))


def _ttfts(rows: Iterable[Row]) -> list[float]:
    """Sorted, in seconds."""
    return sorted(row.ttft_ms / 1e3 for row in rows if row.ttft_ms is not None)


def _ttft_over_time(shown: Sequence[_ShownRun]) -> Figure:
    title = "Time to first token over time"
    drawn = [run for run in shown if _ttfts(run.completed)]
    if not drawn:
        return Figure(title, "No time was simulated, or no request completed.", None)

    def at(percent: float) -> Callable[[Sequence[Row]], float]:
        return lambda found: percentile(_ttfts(found), percent)

    def words_of(run: _ShownRun) -> str:
        every = _ttfts(run.completed)
        low, high = (format_seconds(percentile(every, percent)) for percent in (50, 99))
        return f"Half of the requests had their first token within {low}, 99% within {high}, queueing included."

    lines = [
        run.line(f"p{percent}", *_binned(run.completed, at(percent)), kind)
        for run in drawn
        for kind, percent in enumerate((50, 99))
    ]
    words = _words(drawn, words_of)
    axes = Axis("arrival, s", start=0), Axis("time to first token, s", log=True)
    return Figure(title, words, line_plot("ttft", words, *axes, lines))


def _ttft_distribution(shown: Sequence[_ShownRun]) -> Figure:
    title = "Time to first token, cached and not"
    lines, captions = [], []
    for run in shown:
        for kind, (label, values) in enumerate(
            {
                "with cached tokens": _ttfts(row for row in run.completed if row.cached_tokens),
                "without": _ttfts(row for row in run.completed if not row.cached_tokens),
            }.items()
        ):
            if values:
                shares = [at / QUANTILES for at in range(1, QUANTILES + 1)]
                lines.append(run.line(label, [percentile(values, 100 * share) for share in shares], shares, kind))
                median = format_seconds(percentile(values, 50))
                captions.append(
                    run.label(f"{median} is the median of the {format_count(len(values), 'request')} {label}.")
                )
    if not lines:
        return Figure(title, "No time was simulated, or no request completed.", None)
    words = "\n".join(captions)
    axes = Axis("time to first token, s", log=True), Axis("share of requests", share=True, start=0, stop=1)
    return Figure(title, words, line_plot("distribution", words, *axes, lines))


def _memory(shown: Sequence[_ShownRun]) -> Figure:
    title = "Memory by tier"
    lines, captions = [], []
    for run in shown:
        series, machine = run.results.series, run.results.machine
        if series is None or not series.times:
            continue
        block, replicas = machine.block_bytes / GIB, series.replicas
        used = [block * sum(values) for values in zip(*(each.used_blocks for each in replicas), strict=True)]
        cached = [block * sum(values) for values in zip(*(each.cached_blocks for each in replicas), strict=True)]
        lines += [run.line("in use", series.seconds, used, 0), run.line("cached", series.seconds, cached, 1)]
        for kind, tier in enumerate(sorted({tier for each in replicas for tier in each.tier_bytes}), 2):
            columns = [each.tier_bytes[tier] for each in replicas if tier in each.tier_bytes]
            held = [sum(values) / GIB for values in zip(*columns, strict=True)]
            lines.append(run.line(tier, series.seconds[-len(held) :], held, kind))
        total = block * machine.num_blocks * run.results.config.replicas
        captions.append(
            run.label(
                f"All KV memory is {total:,.1f} GiB; requests held at most {max(used):,.1f} at a time, and at the end "
                f"{cached[-1]:,.1f} were cached."
            )
        )
    if not lines:
        return Figure(title, "No time was simulated.", None)
    words = "\n".join(captions)
    svg = line_plot("memory", words, Axis("time, s", start=0), Axis("GiB of all replicas", start=0), lines)
    return Figure(title, words, svg)


def _computed(rows: Rows, replicas: int) -> list[int]:
    tokens = [0] * replicas
    for row in rows:
        if row.replica is not None:
            tokens[row.replica] += row.prefilled_tokens
    return tokens


def _load(shown: Sequence[_ShownRun]) -> Figure:
    title = "Load per replica"
    bars, captions = {}, []
    for run in shown:
        tokens = _computed(run.results.rows, run.results.config.replicas)
        mean = sum(tokens) / len(tokens)
        if mean:
            bars[run.name] = tokens
            busiest = f"; the busiest has {max(tokens) / mean:.2f} times as many" if len(tokens) > 1 else ""
            captions.append(run.label(f"A replica computed {mean:,.0f} prompt tokens on average{busiest}."))
    if not bars:
        return Figure(title, "No replica computed anything.", None)
    words = "\n".join(captions)
    return Figure(title, words, bar_plot("load", words, Axis("replica"), Axis("prompt tokens computed", start=0), bars))


def _hit_rate_by_capacity(shown: Sequence[_ShownRun]) -> Figure:
    """Runs with equal blocks share one curve, with a mark for each run."""
    title = "Hit rate against capacity"
    lines: list[Line] = []
    marks, captions, curves = {}, [], set[tuple[int, int]]()
    for run in shown:
        curve, machine = run.curve, run.results.machine
        if curve is None or not curve.lru.unlimited.hits:
            continue
        block = machine.block_bytes / GIB
        here = machine.num_blocks * block
        marks[run.label("a replica's KV memory")] = here
        alike = (machine.block_size, machine.block_bytes)
        if alike in curves:
            captions.append(run.label(f"A replica has {here:,.1f} GiB."))
            continue
        sizes = [capacity * block for capacity in curve.capacities]
        unlimited = curve.lru.unlimited.token_rate
        several = run if curves else _ShownRun("", 0, run.results, None, ())
        curves.add(alike)
        lines += [
            several.line("LRU", sizes, [curve.lru.at(capacity).token_rate for capacity in curve.capacities], 0),
            several.line("best possible", sizes, [hits.token_rate for hits in curve.best], 1),
            several.line("unlimited", [sizes[0], sizes[-1]], [unlimited, unlimited], 2),
        ]
        captions.append(
            run.label(
                f"What one cache for the first {curve.requests:,} requests would find, one after the other: LRU, the "
                f"best possible (Belady), and {format_share(unlimited)} without limit. {curve.lru.enough * block:,.1f} "
                f"GiB are as good as any more; a replica has {here:,.1f}."
            )
        )
    if not lines:
        return Figure(title, "The workload does not say that any two prompts share a beginning.", None)
    words = "\n".join(captions)
    axes = Axis("capacity, GiB", log=True), Axis("share of prompt tokens", share=True, start=0)
    return Figure(title, words, line_plot("capacity", words, *axes, lines, marks))
