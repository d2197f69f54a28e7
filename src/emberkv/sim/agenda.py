"""What happens when in virtual time: the queue of actions, and the times at which replicas are lost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush
from random import Random

from emberkv.errors import ConfigError
from emberkv.workload.bounds import MOST_SECONDS

Action = Callable[[], None]

_END_OF_TIME = round(MOST_SECONDS * 1e9)


class Kind(IntEnum):
    """What happens; at equal times in this order. New steps begin after all that happens at a time."""

    STEP_ENDS = 0
    LOAD_ENDS = 1
    FAILURE = 2
    RESTART = 3
    ARRIVAL = 4


@dataclass(slots=True)
class Agenda:
    """Actions in order of time (nanoseconds), then kind, then rank, then as they were added."""

    _heap: list[tuple[int, Kind, int, int, Action]] = field(default_factory=list)
    _added: int = 0

    @property
    def next_time(self) -> int | None:
        """None when nothing more happens."""
        return self._heap[0][0] if self._heap else None

    def add(self, time: int, kind: Kind, action: Action, *, rank: int = 0) -> None:
        """Raises ConfigError for a time beyond the virtual clock's."""
        if time > _END_OF_TIME:
            raise ConfigError(f"the simulation comes to {time / 1e9:g} s; it has room for {MOST_SECONDS:g} s")
        self._added += 1
        heappush(self._heap, (time, kind, rank, self._added, action))

    def pop(self) -> Action:
        return heappop(self._heap)[-1]


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
