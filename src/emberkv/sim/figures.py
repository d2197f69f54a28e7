"""The drawing board: plots as SVG text, the same bytes each time, told apart by line and hatch as well as by colour."""

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

STYLES = (
    {"color": "#0b4f8a", "linestyle": "-"},
    {"color": "#b04a00", "linestyle": (0, (5, 2))},
    {"color": "#1b6b3a", "linestyle": (0, (1, 1.5))},
    {"color": "#5b2a86", "linestyle": (0, (6, 2, 1, 2))},
)
"""Dark on white, and of different dashes: a copy in black and white still tells them apart."""

_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#cccccc",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "emberkv",
    "text.parse_math": False,
}

_REFERENCES = re.compile(r'(\bid="|url\(#|href="#)')
MOST_BARS = 48


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; x and y of equal length. None in y leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Axis:
    """share: shown as percent. start, stop: where the axis must begin and end; the values decide unless given."""

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
            axes.plot(line.x, values, label=line.label, **STYLES[number % len(STYLES)])
        for label, at in (marks or {}).items():
            axes.axvline(at, color="black", linewidth=1.0, linestyle="-", label=label)
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        if len(lines) + len(marks or {}) > 1:
            _legend(axes, len(lines) + len(marks or {}))

    return _svg(name, description, draw)


def bar_plot(name: str, description: str, x: Axis, y: Axis, heights: Sequence[float]) -> str:
    """A bar for each height, numbered from 0, with their mean; of many, a line over all in falling order instead."""
    if len(heights) > MOST_BARS:
        falling = sorted(heights, reverse=True)
        order = Axis(f"{x.label}, the most loaded first")
        return line_plot(name, description, order, y, [Line(y.label, range(len(falling)), falling)])

    def draw(axes: Axes) -> None:
        axes.bar(
            range(len(heights)), heights, width=0.7, color="#d5e3f0", edgecolor="#0b4f8a", hatch="//", linewidth=1.0
        )
        mean = sum(heights) / len(heights)
        axes.axhline(mean, color="black", linewidth=1.2, linestyle=(0, (5, 2)), label=f"mean {mean:,.0f}")
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(0, len(heights), max(1, len(heights) // 12)))
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        _legend(axes, 1)

    return _svg(name, description, draw)


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
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=entries)


def _svg(name: str, description: str, draw: Callable[[Axes], None]) -> str:
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(6.2, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = _REFERENCES.sub(rf"\g<1>{name}-", text[text.index("<svg") :].strip())
    opening = f'<svg role="img" aria-label="{escape(description)}"'
    return text.replace("<svg", opening, 1)
