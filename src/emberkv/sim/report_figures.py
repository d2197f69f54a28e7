"""The gallery: what a report shows of a run, each picture with the words that say what is to be seen on it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from emberkv.sim.curves.curve import CapacityCurve
from emberkv.sim.figures import Axis, Line, bar_plot, line_plot
from emberkv.sim.hardware import GIB
from emberkv.sim.latencies import percentile, ratio
from emberkv.sim.outcome import Status
from emberkv.sim.rows import Row, Rows
from emberkv.sim.run import Results
from emberkv.sim.timing import NANOSECONDS

BINS = 60
QUANTILES = 200


@dataclass(frozen=True, slots=True)
class Figure:
    """svg: None where there is nothing to draw; words then say why."""

    title: str
    words: str
    svg: str | None


def figures_of(results: Results, curve: CapacityCurve | None, name: str) -> list[Figure]:
    """The same figures in the same order for every run. name: begins the ids of this run's elements."""
    completed = [row for row in results.rows if row.status is Status.COMPLETED]
    return [
        _hit_rate_over_time(completed, name),
        _ttft_over_time(completed, name),
        _ttft_distribution(completed, name),
        _memory(results, name),
        _load(results.rows, results.config.replicas, name),
        _hit_rate_by_capacity(results, curve, name),
    ]


def _binned(rows: Sequence[Row], value: Callable[[list[Row]], float | None]) -> tuple[list[float], list[float | None]]:
    """A value for the rows that arrive in each of `BINS` stretches of time, at the stretch's middle."""
    last = max(row.arrival for row in rows)
    bins: list[list[Row]] = [[] for _ in range(BINS)]
    for row in rows:
        bins[min(BINS - 1, row.arrival * BINS // max(1, last))].append(row)
    width = last / NANOSECONDS / BINS
    return [(at + 0.5) * width for at in range(BINS)], [value(found) if found else None for found in bins]


def _hit_rate(rows: Iterable[Row]) -> float:
    found = list(rows)
    return ratio(sum(row.cached_tokens for row in found), sum(row.prompt_tokens for row in found))


def _hit_rate_over_time(rows: Sequence[Row], name: str) -> Figure:
    title = "Hit rate over time"
    if not rows:
        return Figure(title, "No request completed.", None)
    by_arrival = sorted(rows, key=lambda row: row.arrival)
    tenth = max(1, len(rows) // 10)
    words = (
        f"Share of prompt tokens found in the cache, by time of arrival: {_hit_rate(by_arrival[:tenth]):.1%} of the "
        f"first tenth of requests, {_hit_rate(by_arrival[-tenth:]):.1%} of the last; {_hit_rate(rows):.1%} in all."
    )
    line = Line("hit rate", *_binned(rows, _hit_rate))
    svg = line_plot(f"{name}-hits", words, Axis("arrival, s", start=0), Axis("hit rate", share=True, start=0), [line])
    return Figure(title, words, svg)


def _ttfts(rows: Iterable[Row]) -> list[float]:
    """Sorted, in milliseconds."""
    return sorted(row.ttft_ms for row in rows if row.ttft_ms is not None)


def _ttft_over_time(rows: Sequence[Row], name: str) -> Figure:
    title = "Time to first token over time"
    every = _ttfts(rows)
    if not every:
        return Figure(title, "No time was simulated, or no request completed.", None)

    def at(percent: float) -> Callable[[list[Row]], float | None]:
        return lambda found: percentile(ttfts, percent) if (ttfts := _ttfts(found)) else None

    lines = [Line("p50", *_binned(rows, at(50))), Line("p99", *_binned(rows, at(99)))]
    words = (
        f"Time to first token by time of arrival, queueing included, logarithmic: p50 {percentile(every, 50):,.0f} ms "
        f"and p99 {percentile(every, 99):,.0f} ms over the whole run."
    )
    axes = Axis("arrival, s", start=0), Axis("time to first token, ms", log=True)
    return Figure(title, words, line_plot(f"{name}-ttft", words, *axes, lines))


def _ttft_distribution(rows: Sequence[Row], name: str) -> Figure:
    title = "Time to first token, cached and not"
    kinds = {
        "with cached tokens": _ttfts(row for row in rows if row.cached_tokens),
        "without": _ttfts(row for row in rows if not row.cached_tokens),
    }
    if not any(kinds.values()):
        return Figure(title, "No time was simulated, or no request completed.", None)
    lines, told = [], []
    for label, values in kinds.items():
        if values:
            shares = [at / QUANTILES for at in range(1, QUANTILES + 1)]
            lines.append(Line(label, [percentile(values, 100 * share) for share in shares], shares))
            told.append(f"{percentile(values, 50):,.0f} ms for the {len(values):,} {label}")
    words = f"Share of requests whose first token came within a time. Medians: {', '.join(told)}."
    axes = Axis("time to first token, ms", log=True), Axis("share of requests", share=True, start=0, stop=1)
    return Figure(title, words, line_plot(f"{name}-distribution", words, *axes, lines))


def _memory(results: Results, name: str) -> Figure:
    title, series = "Memory by tier", results.series
    if series is None or not series.times:
        return Figure(title, "No time was simulated.", None)
    block = results.machine.block_bytes / GIB
    used = [block * sum(values) for values in zip(*(each.used_blocks for each in series.replicas), strict=True)]
    cached = [block * sum(values) for values in zip(*(each.cached_blocks for each in series.replicas), strict=True)]
    lines = [Line("pool, held by requests", series.seconds, used), Line("pool, cached", series.seconds, cached)]
    for tier in sorted({tier for each in series.replicas for tier in each.tier_bytes}):
        columns = [each.tier_bytes[tier] for each in series.replicas if tier in each.tier_bytes]
        held = [sum(values) / GIB for values in zip(*columns, strict=True)]
        lines.append(Line(tier, series.seconds[-len(held) :], held))
    total = block * results.machine.num_blocks * results.config.replicas
    words = (
        f"KV state in GiB over all replicas. The pools take {total:,.1f}; at most {max(used):,.1f} was held by "
        f"requests at a time, and at the end {cached[-1]:,.1f} was cached, held or not."
    )
    svg = line_plot(f"{name}-memory", words, Axis("time, s", start=0), Axis("GiB", start=0), lines)
    return Figure(title, words, svg)


def _load(rows: Rows, replicas: int, name: str) -> Figure:
    title = "Load per replica"
    tokens = [0] * replicas
    for row in rows:
        if row.replica is not None:
            tokens[row.replica] += row.prefilled_tokens
    mean = sum(tokens) / replicas
    if not mean:
        return Figure(title, "No replica computed anything.", None)
    words = (
        f"Prompt tokens that each replica computed; the busiest has {max(tokens) / mean:.2f} times the mean of "
        f"{mean:,.0f}."
    )
    axes = Axis("replica"), Axis("prompt tokens computed", start=0)
    return Figure(title, words, bar_plot(f"{name}-load", words, *axes, tokens))


def _hit_rate_by_capacity(results: Results, curve: CapacityCurve | None, name: str) -> Figure:
    title = "Hit rate against capacity"
    if curve is None or not curve.lru.unlimited.hits:
        return Figure(title, "The workload does not say that any two prompts share a beginning.", None)
    block = results.machine.block_bytes / GIB
    sizes = [capacity * block for capacity in curve.capacities]
    unlimited = curve.lru.unlimited.token_rate
    lines = [
        Line("LRU", sizes, [curve.lru.at(capacity).token_rate for capacity in curve.capacities]),
        Line("best possible", sizes, [hits.token_rate for hits in curve.best]),
        Line("unlimited", [sizes[0], sizes[-1]], [unlimited, unlimited]),
    ]
    here = results.machine.num_blocks * block
    words = (
        f"What one cache for the first {curve.requests:,} requests would find, by its size in GiB, one request after "
        f"the other: LRU exactly, the best possible (Belady), and {unlimited:.1%} without limit. "
        f"{curve.lru.enough * block:,.1f} GiB are as good as any more. A replica's pool here has {here:,.1f} GiB."
    )
    axes = Axis("capacity, GiB", log=True), Axis("hit rate", share=True, start=0)
    return Figure(title, words, line_plot(f"{name}-capacity", words, *axes, lines, {"a replica's pool": here}))
