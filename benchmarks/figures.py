"""What a benchmark says: measured values against a target, as rows of one table."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Row(Protocol):
    """A line of the table. met: None where there is no target."""

    @property
    def met(self) -> bool | None: ...

    def cells(self) -> list[str]: ...

    def as_json(self) -> dict[str, Any]: ...


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Middle:
    """One value a round, in a nutshell."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Middle":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        if self.rounds == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"

    def reaches(self, target: float | None, *, at_least: bool) -> bool | None:
        if target is None:
            return None
        return self.median >= target if at_least else self.median <= target


def _verdict(target: float | None, *, at_least: bool, met: bool | None) -> list[str]:
    bound = "" if target is None else f"{'>=' if at_least else '<='} {number(target)}"
    return [bound, {True: "yes", False: "no", None: ""}[met]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of one figure, taken once a round.

    at_least: it must reach the target; otherwise it must not exceed it. target: None to only show it.
    """

    name: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    at_least: bool = False

    @property
    def middle(self) -> Middle:
        return Middle.of(self.values)

    @property
    def met(self) -> bool | None:
        return self.middle.reaches(self.target, at_least=self.at_least)

    def cells(self) -> list[str]:
        measured = f"{self.middle} {self.unit}"
        return [self.name, measured, "", "", *_verdict(self.target, at_least=self.at_least, met=self.met)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"middle": asdict(self.middle), "met": self.met}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row of two figures, taken once a round, and their ratio round by round.

    at_least: the ratio must reach the target; otherwise it must not exceed it. target: None to only show it.
    """

    name: str
    unit: str
    top_name: str
    top: Sequence[float]
    bottom_name: str
    bottom: Sequence[float]
    target: float | None = None
    at_least: bool = False

    @property
    def ratio(self) -> Middle:
        return Middle.of([a / b for a, b in zip(self.top, self.bottom, strict=True)])

    @property
    def met(self) -> bool | None:
        return self.ratio.reaches(self.target, at_least=self.at_least)

    def cells(self) -> list[str]:
        values = [
            f"{name}: {Middle.of(side)} {self.unit}"
            for name, side in ((self.top_name, self.top), (self.bottom_name, self.bottom))
        ]
        return [self.name, *values, str(self.ratio), *_verdict(self.target, at_least=self.at_least, met=self.met)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": asdict(self.ratio), "met": self.met}


def markdown(rows: Sequence[Row]) -> str:
    """Values are medians over rounds, with the lowest and the highest."""
    lines = [["what", "measured", "against", "ratio", "target", "met"], ["---"] * 6, *(r.cells() for r in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
