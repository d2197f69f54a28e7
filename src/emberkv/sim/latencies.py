"""Latencies and rates of completed requests, and whether they keep their targets."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, fsum, inf
from typing import Any

from emberkv.sim.config import Targets
from emberkv.sim.rows import Row
from emberkv.sim.timing import NANOSECONDS

PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the sorted, non-empty values do not exceed."""
    return ordered[max(0, ceil(percent * len(ordered) / 100) - 1)]


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and extremes of those that are there; None without any."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    return {
        "mean": fsum(found) / len(found),
        **{f"p{percent}": percentile(found, percent) for percent in PERCENTILES},
        "min": found[0],
        "max": found[-1],
    }


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _doubles() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class Pace:
    """Latencies of each request in milliseconds, and throughput from the first arrival to the last completion."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_arrival: float = inf
    last_completion: float = -inf
    ttft: "array[float]" = field(default_factory=_doubles)
    tpot: "array[float]" = field(default_factory=_doubles)
    e2e: "array[float]" = field(default_factory=_doubles)

    def add(self, row: Row) -> None:
        self.requests += 1
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens
        self.first_arrival = min(self.first_arrival, row.arrival / NANOSECONDS)
        if row.completion is not None:
            self.last_completion = max(self.last_completion, row.completion / NANOSECONDS)
        for values, value in ((self.ttft, row.ttft_ms), (self.tpot, row.tpot_ms), (self.e2e, row.e2e_ms)):
            if value is not None:
                values.append(value)

    def found(self) -> dict[str, Any]:
        duration = self.last_completion - self.first_arrival if self.e2e else 0.0
        return {
            "duration": duration,
            "throughput": {
                "requests_per_second": ratio(self.requests, duration),
                "prompt_tokens_per_second": ratio(self.prompt_tokens, duration),
                "output_tokens_per_second": ratio(self.output_tokens, duration),
            },
            "ttft_ms": percentiles(self.ttft),
            "tpot_ms": percentiles(self.tpot),
            "e2e_latency_ms": percentiles(self.e2e),
        }


@dataclass(slots=True)
class Attainment:
    """How many requests kept each target, and all that were given; a latency that there is none of keeps it."""

    targets: Targets
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        all_kept = True
        for name, target in self.targets:
            if target is not None:
                value = getattr(row, name)
                attained = value is None or value <= target
                self.kept[name] += attained
                all_kept = all_kept and attained
        self.kept["all"] += all_kept

    def found(self, wanted: int) -> dict[str, Any] | None:
        """Shares of ``wanted`` requests, those that could be served; None without targets."""
        given = {name: target for name, target in self.targets if target is not None}
        if not given:
            return None
        found = {name: {"target": target, "attained": ratio(self.kept[name], wanted)} for name, target in given.items()}
        return {**found, "all": ratio(self.kept["all"], wanted)}
