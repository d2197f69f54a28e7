"""Plots as SVG text, byte for byte reproducible; line and hatch differ as well as colour.

Colours are the page's CSS variables, so that a plot follows its page into dark mode and onto paper.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
class Line:
    """One curve; x and y of equal length. None in y leaves a gap.

    color, dash: numbers; by default, that of the line among its plot's lines.

    >>> line = Line("hit rate", x=[0.0, 1.0, 2.0], y=[0.5, None, 0.75])
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
    >>> line_plot("hits", "Hit rates.", Axis("s"), axis, [Line("a", [0.0, 1.0], [0.2, 0.4])])[:15]
    '<svg role="img"'
    """

    label: str
    log: bool = False
    share: bool = False
    start: float | None = None
    stop: float | None = None


def line_plot(
    name: str, description: str, x: Axis, y: Axis, lines: Sequence[Line], marks: Mapping[str, float] | None = None
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
        falling = [Line(label, range(len(each)), sorted(each, reverse=True)) for label, each in bars.items()]
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
