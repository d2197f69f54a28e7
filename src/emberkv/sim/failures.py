"""The fire alarm: when replicas are lost, and for how long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Outage:
    """Seconds of virtual time; down_for: None for good."""

    replica: int
    at: float
    down_for: float | None = None


@dataclass(frozen=True, slots=True)
class RandomOutages:
    """Times of each replica's own between being up and lost, and lost and up: exponential, with these means (s)."""

    mean_time_up: float
    mean_time_down: float

    def of(self, replica: int, rng: Random) -> Iterator[Outage]:
        now = 0.0
        while True:
            now += rng.expovariate(1 / self.mean_time_up)
            down = rng.expovariate(1 / self.mean_time_down)
            yield Outage(replica, now, down)
            now += down


def outages(
    planned: Sequence[Outage], drawn: RandomOutages | None, replicas: int, rng: Random
) -> list[Iterator[Outage]]:
    """Each iterator in order of time; the next of one is asked for when the one before is over."""
    found: list[Iterator[Outage]] = []
    for replica in range(replicas):
        own = sorted((each for each in planned if each.replica == replica), key=lambda each: each.at)
        if own:
            found.append(iter(own))
        if drawn is not None:
            found.append(drawn.of(replica, Random(rng.random())))
    return found
