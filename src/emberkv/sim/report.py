"""The HTML report of simulations: one page of one run, or of several compared on equal axes, each figure with a
sentence on what it shows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from emberkv.sim import page
from emberkv.sim.curves import CapacityCurve, capacity_curve
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share
from emberkv.sim.hardware import GIB
from emberkv.sim.outcome import Row, Rows, Status
from emberkv.sim.page import Axis, PlotLine, bar_plot, line_plot
from emberkv.sim.run import Results, compare
from emberkv.sim.summary import percentile, ratio, rejected_sentence
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

    def line(self, text: str, x: Sequence[float], y: Sequence[float | None], kind: int) -> PlotLine:
        """kind: of the line among those of its run. Runs differ in colour and kinds in dash; of one run, both do."""
        return PlotLine(self.label(text), x, y, self.color if self.name else kind, kind)


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
    lines: list[PlotLine] = []
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


_LEFT_OUT = frozenset({"set_up", "computed", "memory_over_time", "replicas"})
"""Keys of the summary that the page shows elsewhere."""

_GROUPS = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time for each further token",
    "e2e_latency_ms": "end to end",
    "slo": "service levels, ms and shares that attain them",
}


def render_report(runs: Mapping[str, Results], *, made: datetime | None = None) -> str:
    """The page of at least one run, by name. Equal runs give equal text, apart from ``made``, the time at its top.

    Raises WorkloadError when a workload cannot be read again.
    """
    title = " against ".join(runs) if len(runs) > 1 else f"{next(iter(runs))}, simulated"
    return page.page(title, _parts(runs, made))


def _parts(runs: Mapping[str, Results], made: datetime | None) -> Iterator[str]:
    several = len(runs) > 1
    for name, run in runs.items():
        begin = f"{name}: " if several else ""
        yield page.paragraph(f"{begin}{run.about.sentence}", "about")
        yield from _verdicts(begin, run)
    first = next(iter(runs.values()))
    if several:
        yield page.section("What changes", [_comparison(runs)])
    else:
        yield page.cards(_cards(first))
    yield page.gallery((each.title, each.words, each.svg) for each in figures_of(runs, _curves(runs)))
    yield page.section("All figures", _tables(runs, [_summary_of(run) for run in runs.values()]))
    yield page.section("Settings", _tables(runs, [_settings_of(run) for run in runs.values()]))
    yield page.paragraph(page.made_at(first.about.version, made), "about")


def _curves(runs: Mapping[str, Results]) -> list[CapacityCurve | None]:
    """The curve of each run, computed once for runs of the same requests in equal blocks."""
    found: dict[tuple[object, ...], CapacityCurve | None] = {}
    keys = [(run.workload.identity, run.machine.block_size, run.config.salted) for run in runs.values()]
    for key, run in zip(keys, runs.values(), strict=True):
        if key not in found:
            found[key] = capacity_curve(run)
    return [found[key] for key in keys]


def _verdicts(begin: str, run: Results) -> Iterator[str]:
    if run.ending.interrupted:
        yield page.paragraph(f"{begin}Interrupted: the figures cover what was simulated until then.", "verdict bad")
    if run.about.defaults_sentence is not None:
        yield page.paragraph(f"{begin}{run.about.defaults_sentence}", "about")
    if run.load is not None:
        yield page.paragraph(f"{begin}{run.load.sentence}", f"verdict {'bad' if run.load.grows else 'good'}")
    requests = run.summary["requests"]
    if requests["rejected"]:
        yield page.paragraph(f"{begin}{rejected_sentence(requests['rejected'], requests['total'])}", "verdict bad")


def _cards(run: Results) -> Iterator[tuple[str, str, str]]:
    found = run.summary
    caching, requests = found["prefix_caching"], found["requests"]
    yield (
        "Hit rate", format_share(caching["token_hit_rate"]),
        f"of prompt tokens; {format_share(caching['request_hit_rate'])} of requests found any",
    )  # fmt: skip
    for label, name in (("Time to first token", "ttft_ms"), ("Each further token", "tpot_ms")):
        times = found[name]
        if times:
            yield label, format_seconds(times["p50"] / 1e3), f"median; p99 {format_seconds(times['p99'] / 1e3)}"
    yield "Requests", f"{requests['completed']:,}", f"completed, {format_share(found['success_rate'])} of all"
    if found["duration"]:
        pace = found["throughput"]
        yield (
            "Throughput", f"{format_rate(pace['requests_per_second'])}/s",
            f"requests over the whole run; {format_rate(pace['output_tokens_per_second'])} output tokens a second",
        )  # fmt: skip
    if found["utilisation"]:
        used = found["utilisation"]
        yield (
            "Busy",
            format_share(used["compute"]),
            f"of the time; {format_share(used['kv_memory'])} of KV blocks in use",
        )
    if found["slo"]:
        unfinished = f"; {requests['unfinished']:,} were unfinished" if requests["unfinished"] else ""
        yield "Service level", format_share(found["slo"]["all"]), f"of requests attain it{unfinished}"


def _comparison(runs: Mapping[str, Results]) -> str:
    """The change is the second run's against the first's, over the requests that both completed."""
    left, right = list(runs.values())[:2]
    found = compare(left, right)
    caption = f"Over the {format_count(found.both, 'request')} that both completed"
    rows = [(line.label, line.cells) for line in found.lines]
    return page.table(rows, caption=caption, columns=["", *list(runs)[:2], "change"])


Leaves = dict[tuple[str, ...], str]


def _summary_of(run: Results) -> Leaves:
    return dict(_flat({key: value for key, value in run.summary.items() if key not in _LEFT_OUT}))


def _settings_of(run: Results) -> Leaves:
    workload = run.workload.generated or run.workload.trace
    assert workload is not None
    parts = {"simulation": run.config.model_dump(mode="json"), "workload": workload.model_dump(mode="json")}
    return dict(_flat(parts))


def _flat(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Leaves by their path. What is empty or None is not shown."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from _flat(inner, (*path, str(number)))
    elif value is not None and value != "":
        yield path, _cell(value, path)


def _cell(value: object, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return _format_float(value, path) if isinstance(value, float) else str(value)


def _format_float(value: float, path: tuple[str, ...]) -> str:
    if path[0].endswith("_ms"):
        return format_seconds(value / 1e3)
    if path[-1] in ("duration", "ended_at"):
        return format_seconds(value)
    if path[-1].endswith(("rate", "ratio", "attained", "all")) or path[0] == "utilisation":
        return f"{value:.2%}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _tables(runs: Mapping[str, Results], sides: Sequence[Leaves]) -> Iterator[str]:
    """One for each first part of a path, with a column for each run; those of one part only come first."""
    paths = dict.fromkeys(path for side in sides for path in side)
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for path in sorted(paths, key=lambda path: len(path) > 1):
        group, rest = (path[0], path[1:]) if len(path) > 1 else ("run", path)
        label = " / ".join(rest).replace("_", " ")
        groups.setdefault(group, []).append((label, [side.get(path, "") for side in sides]))
    columns = ["", *runs] if len(runs) > 1 else []
    for group, rows in groups.items():
        yield page.table(rows, caption=_GROUPS.get(group, group).replace("_", " "), columns=columns)
