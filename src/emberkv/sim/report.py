"""The report: one HTML page that needs nothing else, of one run or of several side by side, readable on paper."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from emberkv.errors import ConfigError
from emberkv.sim.curves.curve import capacity_curve
from emberkv.sim.report_figures import Figure, figures_of
from emberkv.sim.run import Results

_LEFT_OUT = frozenset({"set_up", "memory_over_time", "replicas"})
"""Of the summary: what the page shows elsewhere."""

_WITH_UNITS = {
    "ended_at": "ended at, s", "duration": "duration, s", "ttft_ms": "time to first token, ms",
    "tpot_ms": "time for each further token, ms", "e2e_latency_ms": "end to end, ms", "slo": "service levels attained",
    "average_cached_prefix_length": "average cached prefix, tokens",
}  # fmt: skip

_STYLE = """
body { font: 16px/1.45 sans-serif; color: #000; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #000 }
table { border-collapse: collapse; font-size: .9rem; margin-bottom: 1rem }
caption { text-align: left; font-weight: bold; padding: .3rem 0 }
th, td { padding: .15rem .9rem .15rem 0; text-align: left; border-bottom: 1px solid #ccc; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tbody th { font-weight: normal }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start }
.gallery { display: flex; flex-wrap: wrap; gap: 0 2rem }
.gallery section { flex: 1 1 30rem }
.gallery.several section { flex-basis: 100% }
figure { margin: 0 0 1rem; flex: 1 1 30rem; max-width: 37rem }
figure svg { width: 100%; height: auto }
figcaption { font-size: .9rem }
@media print {
  body { font-size: 10pt; max-width: none; margin: 0 }
  .gallery section, figure { flex-basis: 40% }
  figure, table, tr { break-inside: avoid }
  h2 { break-after: avoid }
}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(runs: Mapping[str, Results], path: Path) -> None:
    """A page of runs by name; several stand side by side. Equal runs give equal bytes.

    Raises ConfigError when the file cannot be written, WorkloadError when a workload cannot be read again.
    """
    text = render_report(runs)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def render_report(runs: Mapping[str, Results]) -> str:
    """The page of at least one run."""
    title = f"emberkv simulate: {', '.join(runs)}"
    body = "".join(_sections(runs))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{body}</main>\n</body>\n</html>\n"
    )


def _sections(runs: Mapping[str, Results]) -> Iterator[str]:
    if any(run.ending.interrupted for run in runs.values()):
        yield "<p><strong>Interrupted: the figures cover what was simulated until then.</strong></p>\n"
    yield _section("Key figures", _tables(list(runs), _key_figures(runs)))
    galleries = [figures_of(run, capacity_curve(run), f"run{number}") for number, run in enumerate(runs.values())]
    if len(runs) > 1:
        yield "<p>Each picture has its own axes.</p>\n"
    yield f'<div class="gallery{" several" if len(runs) > 1 else ""}">\n'
    for row in zip(*galleries, strict=True):
        shown = (_figure(name, figure, len(runs) > 1) for name, figure in zip(runs, row, strict=True))
        yield _section(row[0].title, shown)
    yield "</div>\n"
    yield _section("Settings", _tables(list(runs), _settings(runs)))


def _section(title: str, parts: Iterable[str]) -> str:
    return f'<section>\n<h2>{escape(title)}</h2>\n<div class="side">\n{"".join(parts)}</div>\n</section>\n'


def _figure(name: str, figure: Figure, several: bool) -> str:
    label = f"<strong>{escape(name)}</strong>: " if several else ""
    return f"<figure>\n{figure.svg or ''}\n<figcaption>{label}{escape(figure.words)}</figcaption>\n</figure>\n"


Rows = dict[str, list[str]]
"""Cells by the name of their row, one for each run."""


def _key_figures(runs: Mapping[str, Results]) -> dict[str, Rows]:
    summaries = [{key: value for key, value in run.summary.items() if key not in _LEFT_OUT} for run in runs.values()]
    return _grouped([dict(_flat(summary)) for summary in summaries])


def _settings(runs: Mapping[str, Results]) -> dict[str, Rows]:
    told = []
    for run in runs.values():
        workload = run.workload.generated or run.workload.trace
        assert workload is not None
        parts = {"simulation": run.config.model_dump(mode="json"), "workload": workload.model_dump(mode="json")}
        told.append(dict(_flat(parts)))
    return _grouped(told)


def _flat(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Leaves by their path. What is empty or None is not shown."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from _flat(inner, (*path, str(number)))
    elif value is not None and value != "":
        yield path, _cell(value)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def _grouped(runs: Sequence[Mapping[tuple[str, ...], str]]) -> dict[str, Rows]:
    """Rows under the first part of their path; those of one part only come first."""
    paths = dict.fromkeys(path for run in runs for path in run)
    groups: dict[str, Rows] = {}
    for path in sorted(paths, key=lambda path: len(path) > 1):
        group, rest = (path[0], path[1:]) if len(path) > 1 else ("run", path)
        groups.setdefault(group, {})[" / ".join(rest)] = [run.get(path, "") for run in runs]
    return groups


def _tables(names: Sequence[str], groups: Mapping[str, Rows]) -> Iterator[str]:
    """One for each group, headed by the runs' names where there are several."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    head = f"<thead><tr><td></td>{columns}</tr></thead>\n" if len(names) > 1 else ""
    for group, rows in groups.items():
        lines = (
            f'<tr><th scope="row">{_words(label)}</th>{"".join(_data(cell) for cell in cells)}</tr>\n'
            for label, cells in rows.items()
        )
        yield f"<table>\n<caption>{_words(group)}</caption>\n{head}<tbody>\n{''.join(lines)}</tbody>\n</table>\n"


def _data(cell: str) -> str:
    number = cell.lstrip("-").replace(",", "").replace(".", "", 1).isdigit()
    return f"<td{' class=number' if number else ''}>{escape(cell)}</td>"


def _words(label: str) -> str:
    return escape(_WITH_UNITS.get(label, label).replace("_", " "))
