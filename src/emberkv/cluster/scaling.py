"""How many workers there should be, and which of them is given up: pure decisions over what workers report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from emberkv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker that runs has last reported.

    backlog: seconds of prefill that its waiting and running prompts still need. worth: prompt tokens that requests
    have lately found in its cache, which others would have to compute if it were given up.
    """

    backlog: float
    worth: float


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """When workers are added and given up.

    workers, max_workers: the least and the most there may be. target_backlog: seconds; with more of it for each worker
    during `grow_seconds`, another one is added. shrink_seconds: for so long, what there is to do must have fitted one
    worker less at a quarter of the target, before one is given up.
    """

    workers: int
    max_workers: int
    target_backlog: float = 2.0
    grow_seconds: float = 10.0
    shrink_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= self.max_workers:
            raise ConfigError(f"workers is {self.workers}, max_workers {self.max_workers}; use 1 to max_workers")


@dataclass(slots=True)
class ScalingMemory:
    """Since when more, or fewer, workers have been called for, in seconds; None: they are not."""

    more_since: float | None = None
    fewer_since: float | None = None


def choose_workers(
    names: Sequence[str],
    running: Mapping[str, WorkerLoad | None],
    limits: ScalingLimits,
    memory: ScalingMemory,
    now: float,
) -> set[str]:
    """Which workers there should be from now on, out of ``names``.

    running: those that there are; None for one that has not reported yet. Until all have, none is given up. The worker
    whose cache is worth least goes first; a worker that is added is the first by ``names`` that does not run.

    >>> loads = {"a": WorkerLoad(0.0, worth=90_000), "b": WorkerLoad(0.0, worth=200)}
    >>> choose_workers(["a", "b"], loads, ScalingLimits(1, 1), ScalingMemory(), now=0.0)
    {'a'}
    """
    wanted = _wanted(running, limits, memory, now)
    if wanted >= len(running):
        others = [name for name in names if name not in running]
        return {*running, *others[: wanted - len(running)]}
    known = {name: load.worth for name, load in running.items() if load is not None}
    if len(known) < len(running):
        return set(running)
    return set(sorted(known, key=lambda name: (-known[name], names.index(name)))[:wanted])


def _wanted(running: Mapping[str, WorkerLoad | None], limits: ScalingLimits, memory: ScalingMemory, now: float) -> int:
    count = len(running)
    backlog = sum(load.backlog for load in running.values() if load is not None)
    calls_for_more = count < limits.max_workers and backlog > limits.target_backlog * count
    fits_fewer = count > limits.workers and backlog <= limits.target_backlog / 4 * (count - 1)
    memory.more_since = (now if memory.more_since is None else memory.more_since) if calls_for_more else None
    memory.fewer_since = (now if memory.fewer_since is None else memory.fewer_since) if fits_fewer else None
    if memory.more_since is not None and now - memory.more_since >= limits.grow_seconds:
        memory.more_since = None
        count = min(limits.max_workers, max(count + 1, ceil(backlog / limits.target_backlog / 4)))
    elif memory.fewer_since is not None and now - memory.fewer_since >= limits.shrink_seconds:
        memory.fewer_since = None
        count -= 1
    return min(max(count, limits.workers), limits.max_workers)


class RecentWorth:
    """Prompt tokens found in a cache lately: each counts for half as much after ``half_life`` seconds."""

    def __init__(self, half_life: float = 600.0) -> None:
        self._half_life = half_life
        self._total = 0
        self._worth = 0.0
        self._at = 0.0

    def update(self, hit_tokens: int, now: float) -> float:
        """The worth at ``now``, with ``hit_tokens`` found since the worker's start."""
        self._worth *= 0.5 ** ((now - self._at) / self._half_life)
        self._worth += hit_tokens - self._total if hit_tokens >= self._total else hit_tokens
        self._total, self._at = hit_tokens, now
        return self._worth
