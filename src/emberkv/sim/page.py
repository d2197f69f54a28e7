"""The HTML page of a report: one file without links or scripts, in light and dark, on a phone and on paper; and its
plots as SVG text, byte for byte reproducible.

In plots, line and hatch differ as well as colour. Colours are the page's CSS variables, so that a plot follows its page
into dark mode and onto paper.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

_INK, _GRID, _BAR = "#010101", "#cccccc", "#d5e3f0"
_SERIES = ("#0b4f8a", "#b04a00", "#1b6b3a", "#5b2a86")
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--line)",
    _BAR: "var(--bar)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)},
}
_COLORS = re.compile("|".join(_VARIABLES))
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_HATCHES = ("//", "..", "\\\\", "xx")

_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "emberkv",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

_LEGEND_CHARACTERS = 66
"""How many characters of a legend fit beside each other; a line's sample is as wide as 7 of them."""

_REFERENCES = re.compile(r'(\bid="|url\(#|href="#)')
MOST_BARS = 48


@dataclass(frozen=True, slots=True)
class PlotLine:
    """One curve; x and y of equal length. None in y leaves a gap.

    color, dash: numbers; by default, that of the line among its plot's lines.

    >>> line = PlotLine("hit rate", x=[0.0, 1.0, 2.0], y=[0.5, None, 0.75])
    >>> line.color is None
    True
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int | None = None
    dash: int | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """share: shown as percent. start, stop: where the axis must begin and end; the values decide unless given.

    >>> axis = Axis("share of requests", share=True, start=0, stop=1)
    >>> line_plot("hits", "Hit rates.", Axis("s"), axis, [PlotLine("a", [0.0, 1.0], [0.2, 0.4])])[:15]
    '<svg role="img"'
    """

    label: str
    log: bool = False
    share: bool = False
    start: float | None = None
    stop: float | None = None


def line_plot(
    name: str, description: str, x: Axis, y: Axis, lines: Sequence[PlotLine], marks: Mapping[str, float] | None = None
) -> str:
    """Lines as an SVG element. name: unique on the page. description: what is read out for it.
    marks: vertical lines by what they stand for.
    """

    def draw(axes: Axes) -> None:
        for number, line in enumerate(lines):
            values = [float("nan") if value is None else value for value in line.y]
            color, dash = (number if each is None else each for each in (line.color, line.dash))
            style = {"color": _SERIES[color % len(_SERIES)], "linestyle": _DASHES[dash % len(_DASHES)]}
            axes.plot(line.x, values, label=line.label, **style)
        for number, (label, at) in enumerate((marks or {}).items()):
            axes.axvline(at, color=_INK, linewidth=1.0, linestyle=_DASHES[number % len(_DASHES)], label=label)
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        if len(lines) + len(marks or {}) > 1:
            _legend(axes, len(lines) + len(marks or {}))

    return _svg(name, description, draw)


def bar_plot(name: str, description: str, x: Axis, y: Axis, bars: Mapping[str, Sequence[float]]) -> str:
    """Bars numbered from 0, of one series or several beside each other, each series with its mean; of more than
    `MOST_BARS`, lines over all in falling order instead.
    """
    if max(map(len, bars.values())) > MOST_BARS:
        order = Axis(f"{x.label}, the most loaded first")
        falling = [PlotLine(label, range(len(each)), sorted(each, reverse=True)) for label, each in bars.items()]
        return line_plot(name, description, order, y, falling)

    def draw(axes: Axes) -> None:
        width = 0.8 / len(bars)
        for number, (label, heights) in enumerate(bars.items()):
            color = _SERIES[number % len(_SERIES)]
            at = [index + width * (number - (len(bars) - 1) / 2) for index in range(len(heights))]
            axes.bar(at, heights, width=0.9 * width, color=_BAR, edgecolor=color, hatch=_HATCHES[number], linewidth=1.0)
            mean = sum(heights) / len(heights)
            named = f"{label}, mean {mean:,.0f}" if len(bars) > 1 else f"mean {mean:,.0f}"
            axes.axhline(mean, color=color, linewidth=1.2, linestyle=_DASHES[1], label=named)
        axes.grid(visible=False, axis="x")
        longest = max(map(len, bars.values()))
        axes.set_xticks(range(0, longest, max(1, longest // 12)))
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        _legend(axes, len(bars))

    return _svg(name, description, draw)


def named_bars(name: str, description: str, y: Axis, labels: Sequence[str], bars: Mapping[str, Sequence[float]]) -> str:
    """A group of bars for each label, one of each series."""

    def draw(axes: Axes) -> None:
        height = 0.8 / len(bars)
        for number, (label, lengths) in enumerate(bars.items()):
            at = [index + height * (number - (len(bars) - 1) / 2) for index in range(len(lengths))]
            color = _SERIES[number % len(_SERIES)]
            drawn = axes.barh(at, lengths, height=0.9 * height, color=_BAR, edgecolor=color, label=label)
            for bar in drawn:
                bar.set_hatch(_HATCHES[number])
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        _set_axis(axes, "x", y)
        _legend(axes, len(bars))

    return _svg(name, description, draw, height=max(1.6, 0.9 + 0.42 * len(labels)))


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    side = axes.xaxis if which == "x" else axes.yaxis
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(axis.label)
    if axis.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_minor_formatter(NullFormatter())  # the default one writes mathematical text
    if axis.share:
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        side.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    set_limits(axis.start, axis.stop)


def _legend(axes: Axes, entries: int) -> None:
    """Above the plot, where it covers nothing."""
    longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
    columns = max(1, min(entries, _LEGEND_CHARACTERS // (longest + 7)))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=2.6)


def _svg(name: str, description: str, draw: Callable[[Axes], None], height: float = 3.2) -> str:
    """height: in inches, of a width of 4.8, at which text of 10 points reads well on a phone and on a screen."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    text = file.getvalue()
    text = _REFERENCES.sub(rf"\g<1>{name}-", text[text.index("<svg") :].strip())
    text = _COLORS.sub(lambda found: _VARIABLES[found[0]], text)
    opening = f'<svg role="img" aria-label="{escape(description)}"'
    return text.replace("<svg", opening, 1)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_NUMBER = re.compile(r"(over |under )?[-+$\d]")

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --card: #f5f7f9; --good: #1a6b34; --bad: #a8321c;
  --series-1: #0b4f8a; --series-2: #b04a00; --series-3: #1b6b3a; --series-4: #5b2a86; --bar: #d5e3f0;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e6e9ed; --muted: #9aa4af; --line: #3a424c; --card: #1d232a; --good: #6fce8d; --bad: #ff9a80;
  --series-1: #7db7ee; --series-2: #ffab66; --series-3: #7fd49a; --series-4: #cba6f2; --bar: #24384d;
} }
@media print { :root {
  color-scheme: light;
  --paper: #ffffff; --ink: #000000; --muted: #333333; --line: #bbbbbb; --card: #ffffff; --good: #00501e; --bad: #8a1c08;
  --series-1: #0b4f8a; --series-2: #b04a00; --series-3: #1b6b3a; --series-4: #5b2a86; --bar: #d5e3f0;
} }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 68rem; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0 .75rem; max-width: 46rem }
.about { color: var(--muted); font-size: .9rem }
.verdict { font-size: 1.15rem; font-weight: 600 }
.good { color: var(--good) }
.bad { color: var(--bad) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.4rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.card b { display: block; font-size: 1.5rem; line-height: 1.3 }
.card span { display: block; color: var(--muted); font-size: .82rem; line-height: 1.35 }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem }
figure { margin: 0 0 1rem; max-width: 32rem }
figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: .9rem; color: var(--muted); white-space: pre-line }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start }
.scroll { max-width: 100%; overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tbody th { font-weight: normal; min-width: 5rem }
tr.chosen th, tr.chosen td { font-weight: 600 }
@page { margin: 14mm }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0 }
  .gallery { grid-template-columns: 1fr 1fr }
  figure, table, tr, .card, section { break-inside: avoid }
  section.long { break-inside: auto }
  h2 { break-after: avoid }
  .scroll { overflow: visible }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document. parts: markup that follows the heading."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """kind: about, verdict, or verdict with good or bad."""
    classes = f' class="{kind}"' if kind else ""
    return f"<p{classes}>{escape(text)}</p>\n"


def made_at(version: str, made: datetime | None) -> str:
    return f"emberkv {version}" + ("" if made is None else f", {made:%Y-%m-%d %H:%M} UTC")


def cards(shown: Iterable[tuple[str, str, str]]) -> str:
    """Label, value and a note of each."""
    each = (
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>\n'
        for label, value, note in shown
    )
    return f'<div class="cards">\n{"".join(each)}</div>\n'


def gallery(figures: Iterable[tuple[str, str, str | None]]) -> str:
    """Title, words and the picture (SVG) of each."""
    sections = (
        f"<section>\n<h2>{escape(title)}</h2>\n<figure>\n{svg or ''}\n<figcaption>{escape(words)}</figcaption>\n"
        "</figure>\n</section>\n"
        for title, words, svg in figures
    )
    return f'<div class="gallery">\n{"".join(sections)}</div>\n'


def section(title: str, parts: Iterable[str]) -> str:
    heading = f"<h2>{escape(title)}</h2>"
    return f'<section class="long">\n{heading}\n<div class="tables">\n{"".join(parts)}</div>\n</section>\n'


def table(
    rows: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]],
    *,
    caption: str = "",
    columns: Sequence[str] = (),
    chosen: int | None = None,
) -> str:
    """Rows of a heading and cells; cells that begin with a number stand on the right.

    columns: the head's, the first of them over the headings. chosen: the row that is put in bold.
    """
    pairs = list(rows.items() if isinstance(rows, Mapping) else rows)
    head = "".join(
        f'<th scope="col"{" class=number" if at else ""}>{escape(name)}</th>' for at, name in enumerate(columns)
    )
    lines = (
        f'<tr{" class=chosen" if number == chosen else ""}><th scope="row">{escape(label)}</th>'
        f"{''.join(_cell(cell) for cell in cells)}</tr>\n"
        for number, (label, cells) in enumerate(pairs)
    )
    return (
        f'<div class="scroll"><table>\n{f"<caption>{escape(caption)}</caption>" if caption else ""}'
        f"{f'<thead><tr>{head}</tr></thead>' if columns else ''}\n<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _cell(text: str) -> str:
    number = _NUMBER.match(text) or not text
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
