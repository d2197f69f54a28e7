"""The HTML report of simulations: one page of one run, or of several compared."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from emberkv.sim import page
from emberkv.sim.curves import CapacityCurve, capacity_curve
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share
from emberkv.sim.report_figures import figures_of
from emberkv.sim.run import Results, compare
from emberkv.sim.summary import rejected_sentence

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
            f"requests; {format_rate(pace['output_tokens_per_second'])} output tokens a second",
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
