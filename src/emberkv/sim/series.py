"""How full and how busy the replicas are, sampled over virtual time in bounded memory."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from emberkv.sim.timing import NANOSECONDS

MOST_SAMPLES = 512


class Sampled(Protocol):
    """What is read of a replica at a sample."""

    @property
    def in_flight(self) -> int: ...

    @property
    def computed_tokens(self) -> int: ...

    @property
    def used_blocks(self) -> int: ...

    @property
    def cached_blocks(self) -> int: ...

    @property
    def tier_bytes(self) -> Mapping[str, int]: ...


@dataclass(slots=True)
class ReplicaSeries:
    """One replica's values, one for each sample. computed_tokens: prefilled since the start. used: held by requests."""

    in_flight: "array[int]" = field(default_factory=lambda: array("q"))
    computed_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    used_blocks: "array[int]" = field(default_factory=lambda: array("q"))
    cached_blocks: "array[int]" = field(default_factory=lambda: array("q"))
    tier_bytes: dict[str, "array[int]"] = field(default_factory=dict)

    @property
    def columns(self) -> list["array[int]"]:
        return [self.in_flight, self.computed_tokens, self.used_blocks, self.cached_blocks, *self.tier_bytes.values()]


@dataclass(slots=True)
class Series:
    """Samples at multiples of an interval that doubles whenever there are `MOST_SAMPLES` of them."""

    replicas: list[ReplicaSeries]
    interval: int = NANOSECONDS // 64
    times: "array[int]" = field(default_factory=lambda: array("q"))
    _next: int = 0

    @property
    def seconds(self) -> list[float]:
        return [time / NANOSECONDS for time in self.times]

    def until(self, now: int, replicas: Sequence[Sampled]) -> None:
        """Nothing has changed since the last happening: sample what is due before ``now``."""
        while self._next < now:
            self.times.append(self._next)
            for series, replica in zip(self.replicas, replicas, strict=True):
                _sample(series, replica)
            self._next += self.interval
            if len(self.times) == MOST_SAMPLES:
                self._thin_out()

    def _thin_out(self) -> None:
        self.interval *= 2
        self._next = self.times[-2] + self.interval
        for column in (self.times, *(column for each in self.replicas for column in each.columns)):
            del column[1::2]


def _sample(series: ReplicaSeries, replica: Sampled) -> None:
    series.in_flight.append(replica.in_flight)
    series.computed_tokens.append(replica.computed_tokens)
    series.used_blocks.append(replica.used_blocks)
    series.cached_blocks.append(replica.cached_blocks)
    for name, held in replica.tier_bytes.items():
        series.tier_bytes.setdefault(name, array("q")).append(held)
