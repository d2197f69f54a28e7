"""Two set-ups side by side, over the requests that both completed."""

from dataclasses import dataclass

from emberkv.errors import WorkloadError
from emberkv.sim.formatting import format_rate, format_seconds, format_share
from emberkv.sim.inputs import Workload
from emberkv.sim.outcome import Row, Status
from emberkv.sim.run import Results
from emberkv.sim.summary import percentiles, prefix_caching


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of both set-ups; None where there is none. unit: ``ms``, ``of ...`` for a share, or a count's name.

    >>> line = Line("TTFT mean", "ms", left=200.0, right=150.0)
    >>> line.change, line.cells
    (-0.25, ['200 ms', '150 ms', '-25.0%'])
    """

    name: str
    unit: str
    left: float | None
    right: float | None

    @property
    def change(self) -> float | None:
        """The change from left to right: -0.25 is a quarter less."""
        return None if self.left is None or self.right is None or not self.left else self.right / self.left - 1

    @property
    def label(self) -> str:
        return self.name if self.unit in ("", "ms") else f"{self.name}, {self.unit}"

    @property
    def cells(self) -> list[str]:
        """Left, right and change, as a person reads them; a share's change is in percentage points."""
        if self.left is None or self.right is None:
            return [*("" if value is None else self._words(value) for value in (self.left, self.right)), ""]
        if self._is_share:
            change = f"{100 * (self.right - self.left):+.1f} points"
        else:
            change = "" if self.change is None else f"{self.change:+.1%}"
        return [self._words(self.left), self._words(self.right), change]

    @property
    def _is_share(self) -> bool:
        return self.unit.startswith("of ")

    def _words(self, value: float) -> str:
        if self._is_share:
            return format_share(value) if value >= 0 else f"{value:.1%}"
        return format_seconds(value / 1e3) if self.unit == "ms" else format_rate(value)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two set-ups side by side. both: how many requests completed in both; lines after the first three are over these.

    >>> found = Comparison(120, [Line("preemptions", "", 0, 4)])
    >>> found.both, found.lines[0].label
    (120, 'preemptions')
    """

    both: int
    lines: list[Line]


def same_workload(left: Workload | None, right: Workload | None) -> Workload:
    """The one that both have, or the only one of the two. Raises WorkloadError when they differ or none is there."""
    given = [each for each in (left, right) if each is not None]
    if not given:
        raise WorkloadError("neither set-up has a workload or a trace; give one, or a workload besides")
    if len({each.identity for each in given}) > 1:
        raise WorkloadError("the set-ups have different workloads; give the one that both are to serve")
    return given[0]


def compare(left: Results, right: Results) -> Comparison:
    """Compare results over the requests that both completed. Their rows must have kept their ids."""
    rows = [_completed(each) for each in (left, right)]
    both = sorted(rows[0].keys() & rows[1].keys())
    return Comparison(len(both), [*_totals(left, right), *_lines(*([each[name] for name in both] for each in rows))])


def _completed(results: Results) -> dict[str, Row]:
    pairs = zip(results.rows.ids, results.rows, strict=True)
    return {name: row for name, row in pairs if row.status is Status.COMPLETED}


def _totals(left: Results, right: Results) -> list[Line]:
    sides = [each.summary for each in (left, right)]
    return [
        Line("completed", "requests", *(side["requests"]["completed"] for side in sides)),
        Line("throughput", "requests a second", *(side["throughput"]["requests_per_second"] for side in sides)),
        Line("preemptions", "", *(side["preemptions"] for side in sides)),
    ]


def _lines(left: list[Row], right: list[Row]) -> list[Line]:
    """The same requests in the same order."""
    caching = [prefix_caching(rows) for rows in (left, right)]
    later = [each["conversational_token_hit_rate"] for each in caching]
    lines = [
        Line("hit rate", "of prompt tokens", *(each["token_hit_rate"] for each in caching)),
        Line("hit rate", "of requests", *(each["request_hit_rate"] for each in caching)),
        Line(
            "hit rate of later turns",
            "of their prompt tokens",
            *later,
        ),
        Line("prefill reduction", "of prompt tokens", *(each["prefill_reduction_ratio"] for each in caching)),
        Line("tokens prefilled", "a request", *(each["average_tokens_prefilled"] for each in caching)),
    ]
    for title, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("end to end", "e2e_ms")):
        sides = [percentiles([getattr(row, name) for row in rows]) for rows in (left, right)]
        for figure in ("mean", "p50", "p99"):
            lines.append(Line(f"{title} {figure}", "ms", *(None if side is None else side[figure] for side in sides)))
    return lines
