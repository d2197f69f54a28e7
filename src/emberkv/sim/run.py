"""Runs a simulation and writes its rows as requests end; compares two, over the requests that both completed."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from emberkv.cluster.decision_log import DecisionLog
from emberkv.cluster.routing import Recorder
from emberkv.core.stats import SchedulerStats
from emberkv.errors import ConfigError, WorkloadError
from emberkv.sim import cache_only
from emberkv.sim.build import Machine, SimulatedSystem, about, build, machine_of
from emberkv.sim.config import SimulationConfig, Workload, WorkloadSource, opened
from emberkv.sim.formatting import format_rate, format_seconds, format_share
from emberkv.sim.outcome import CsvRows, RequestOutcome, Row, Rows, Status
from emberkv.sim.replica import Series
from emberkv.sim.simulator import Progress, SimulationEnd
from emberkv.sim.summary import OfferedLoad, load_of, percentiles, prefix_caching, summarize
from emberkv.sim.timing import NANOSECONDS, nanoseconds

COLLECT_AFTER = 1_000_000
"""Objects made and not freed after which Python looks for reference cycles during a simulation. Requests leave no
cycles behind, and at Python's usual 700 the search takes a few percent of the time."""


@dataclass(frozen=True)
class Results:
    """What a simulation found. stats: of each replica, one for each time that it started.

    series: over time; None where there was no time. workload: opens the same requests again. busy: seconds in which
    each replica computed.

    >>> import emberkv
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> results = emberkv.simulate({"workload": chat}, model="llama-3.1-8b", hardware="h100", replicas=2)
    >>> results.about.machine_text, len(results.rows), results.summary["preemptions"]
    ('llama-3.1-8b (bf16) on H100 SXM', 12, 0)
    """

    config: SimulationConfig
    workload: Workload
    machine: Machine
    rows: Rows
    stats: Sequence[Sequence[SchedulerStats]]
    ending: SimulationEnd
    series: Series | None = None
    busy: Sequence[float] = ()

    @cached_property
    def about(self) -> SimulatedSystem:
        return about(self.config, self.machine)

    @cached_property
    def load(self) -> OfferedLoad | None:
        """Whether the set-up keeps up; None where there was no time."""
        return None if self.config.cache_only else load_of(self.rows, self.config.replicas)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All figures, as JSON takes them."""
        how = {
            "computed": self.about.as_dict(),
            "block_size": self.machine.block_size,
            "kv_blocks": self.machine.num_blocks,
            "ended_at": self.ending.at,
            "interrupted": self.ending.interrupted,
        }
        blocks_of = self.machine.block_size if self.config.cache_only else None
        slo = None if self.config.cache_only else self.config.slo
        found = summarize(self.rows, slo=slo, series=self.series, blocks_of=blocks_of)
        load = {"load": self.load.as_dict() if self.load else None, "utilisation": self._utilisation()}
        return {"set_up": self.config.model_dump(mode="json", exclude_unset=True), **how, **load, **found}

    def _utilisation(self) -> dict[str, float] | None:
        """Means over replicas and time: shares of the time in which they computed anything, and of their KV blocks that
        requests held.
        """
        if self.series is None or not self.ending.at:
            return None
        held = [blocks for each in self.series.replicas for blocks in each.used_blocks]
        return {
            "compute": sum(self.busy) / (self.ending.at * self.config.replicas),
            "kv_memory": sum(held) / max(1, len(held)) / self.machine.num_blocks,
        }


def no_progress(done: int, now: float) -> None:
    """Progress is not shown."""


def simulate(
    workload: WorkloadSource,
    *,
    csv: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Results:
    """Replay a workload through the scheduler, cache and router that serve, in virtual time.

    settings: keys of ``simulation`` in docs/simulation.md, such as model, hardware, replicas, routing, kv_blocks or
    cache_only; they take precedence over the workload's own. csv: a file that gets a row for each request. progress:
    called with the number of requests done and the virtual time in seconds.

    Raises ConfigError for an unknown setting or one that cannot work, WorkloadError for a workload that cannot be read.

    >>> import emberkv
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> results = emberkv.simulate({"workload": chat}, model="llama-3.1-8b", hardware="h100", hit_unit=1)
    >>> results.summary["requests"]["completed"], round(results.summary["prefix_caching"]["token_hit_rate"], 3)
    (12, 0.538)
    """
    config, requests = opened(workload, settings)
    return run_simulation(
        config, requests, csv_file=None if csv is None else Path(csv), progress=progress or no_progress
    )


def run_simulation(
    config: SimulationConfig,
    workload: Workload,
    *,
    csv_file: Path | None = None,
    decisions_file: Path | None = None,
    keep_ids: bool = False,
    progress: Progress = no_progress,
) -> Results:
    """Run a set-up; an interrupt by the user (KeyboardInterrupt) ends it early, with the results so far.

    csv_file: gets a row for each request as it ends. decisions_file: gets a line for each routing decision. Raises
    ConfigError and WorkloadError.
    """
    if decisions_file is not None and config.replicas == 1:
        raise ConfigError(
            "decisions are recorded where there is something to decide: --record-decisions needs 2 replicas"
        )
    machine = machine_of(config, config.block_size or workload.block_size())
    if workload.is_empty():
        raise WorkloadError("the workload has no requests")
    rows = Rows(tuple(tier.name for tier in config.tiers), keep_ids=keep_ids)
    with _opened(csv_file) as file, _recording(decisions_file, config.routing) as record, _rare_collections:
        table = None if file is None else CsvRows(file, rows.tiers)
        emit = _recorder(rows, table, nanoseconds(config.warm_up))
        if config.cache_only:
            replay = cache_only.Replay(config, machine, record)
            ending = replay.run(workload.source(), emit, progress)
            return Results(config, workload, machine, rows, replay.stats, ending)
        simulator = build(config, machine, workload.source(), emit, progress, record)
        ending = simulator.run()
    stats = [replica.stats for replica in simulator.replicas]
    busy = [replica.busy / NANOSECONDS for replica in simulator.replicas]
    return Results(config, workload, machine, rows, stats, ending, simulator.series, busy)


class _RareCollections(AbstractContextManager[None]):
    """The garbage collector, of which the process has one, runs after `COLLECT_AFTER` objects while any simulation
    does, unless it is off or runs less often already.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._simulations = 0
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if self._simulations == 0:
                self._usual = gc.get_threshold()
                if 0 < self._usual[0] < COLLECT_AFTER:
                    gc.set_threshold(COLLECT_AFTER, *self._usual[1:])
            self._simulations += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._simulations -= 1
            if self._simulations == 0:
                gc.set_threshold(*self._usual)


_rare_collections = _RareCollections()


def _recorder(rows: Rows, table: CsvRows | None, warm_up: int) -> Callable[[RequestOutcome], None]:
    """The function that takes outcomes; those of the warm-up are in neither rows nor table."""

    def record(outcome: RequestOutcome) -> None:
        if outcome.arrival >= warm_up:
            rows.add(outcome)
            if table is not None:
                table.add(outcome)

    return record


@contextmanager
def _recording(path: Path | None, routing: str) -> Iterator[Recorder | None]:
    """The function that writes routing decisions to a file; None without one."""
    if path is None:
        yield None
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield DecisionLog(file, routing).record


def _opened(path: Path | None) -> AbstractContextManager[TextIO | None]:
    if path is None:
        return nullcontext()
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of both set-ups; None where there is none. unit: ``ms``, ``of ...`` for a share, or a count's name.

    >>> figure = ComparedFigure("TTFT mean", "ms", left=200.0, right=150.0)
    >>> figure.change, figure.cells
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

    >>> found = Comparison(120, [ComparedFigure("preemptions", "", 0, 4)])
    >>> found.both, found.lines[0].label
    (120, 'preemptions')
    """

    both: int
    lines: list[ComparedFigure]


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


def _totals(left: Results, right: Results) -> list[ComparedFigure]:
    sides = [each.summary for each in (left, right)]
    return [
        ComparedFigure("completed", "requests", *(side["requests"]["completed"] for side in sides)),
        ComparedFigure(
            "throughput", "requests a second", *(side["throughput"]["requests_per_second"] for side in sides)
        ),
        ComparedFigure("preemptions", "", *(side["preemptions"] for side in sides)),
    ]


def _lines(left: list[Row], right: list[Row]) -> list[ComparedFigure]:
    """The same requests in the same order."""
    caching = [prefix_caching(rows) for rows in (left, right)]
    later = [each["conversational_token_hit_rate"] for each in caching]
    lines = [
        ComparedFigure("hit rate", "of prompt tokens", *(each["token_hit_rate"] for each in caching)),
        ComparedFigure("hit rate", "of requests", *(each["request_hit_rate"] for each in caching)),
        ComparedFigure(
            "hit rate of later turns",
            "of their prompt tokens",
            *later,
        ),
        ComparedFigure("prefill reduction", "of prompt tokens", *(each["prefill_reduction_ratio"] for each in caching)),
        ComparedFigure("tokens prefilled", "a request", *(each["average_tokens_prefilled"] for each in caching)),
    ]
    for title, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("end to end", "e2e_ms")):
        sides = [percentiles([getattr(row, name) for row in rows]) for rows in (left, right)]
        for figure in ("mean", "p50", "p99"):
            lines.append(
                ComparedFigure(f"{title} {figure}", "ms", *(None if side is None else side[figure] for side in sides))
            )
    return lines
