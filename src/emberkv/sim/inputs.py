"""Opens the workload of a set-up: its requests, as often as they are needed, and their block size."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from emberkv.errors import ConfigError, UnsupportedModelError, WorkloadError
from emberkv.sim.config import SetUp, SimulationConfig, TraceConfig, load_set_up, parse_set_up, with_changes
from emberkv.sim.model_spec import load_spec
from emberkv.workload import ember_trace
from emberkv.workload.request import Request
from emberkv.workload.source import ClosedLoopTraceSource, GeneratedSource, Source, TraceSource, is_description
from emberkv.workload.spec import GeneratedWorkload
from emberkv.workload.trace import TraceFormat, clip, detect_format, read_trace, scale_rate

DEFAULT_BLOCK_SIZE = 16


WorkloadSource = str | os.PathLike[str] | Mapping[str, Any]
"""A trace's file, a YAML file, or what such a YAML file holds: ``workload`` or ``trace``, and ``simulation``."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Where the requests of a simulation come from: a generated workload or a trace; exactly one of the two is given.

    folder: where a trace's relative path starts. served: the model that a recording names; empty where it names none.

    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 2, "think_time": 5}
    >>> data = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> config, workload = opened({"workload": data}, {"replicas": 2})
    >>> config.replicas, workload.source().next_arrival().prompt_tokens
    (2, 40)
    """

    generated: GeneratedWorkload | None
    trace: TraceConfig | None
    folder: Path
    served: str = ""

    def source(self) -> Source:
        """The same requests each time. Raises WorkloadError, for a trace also while it is read."""
        if self.generated is not None:
            return GeneratedSource(self.generated)
        assert self.trace is not None
        requests = self._requests(self.trace)
        return ClosedLoopTraceSource(requests) if self.trace.closed_loop else TraceSource(requests)

    def is_empty(self) -> bool:
        """Whether there is not one request. Raises WorkloadError when the first cannot be read."""
        if self.trace is None:
            return self.source().next_arrival() is None
        return next(self._requests(self.trace), None) is None

    def block_size(self) -> int:
        """The block size, in tokens, in which the first request is described; 16 where there is none."""
        if self.trace is None:
            return DEFAULT_BLOCK_SIZE
        first = next(iter(self._requests(self.trace)), None)
        return DEFAULT_BLOCK_SIZE if first is None or first.block_size is None else first.block_size

    @property
    def identity(self) -> str:
        """Equal for equal workloads."""
        if self.trace is not None:
            path = (self.folder / self.trace.path).resolve()
            return self.trace.model_copy(update={"path": str(path)}).model_dump_json()
        assert self.generated is not None
        return f"{self.folder.resolve()} {self.generated.model_dump_json()}"

    def with_seed(self, seed: int) -> "Workload":
        """The same kind of conversations, drawn with another seed; a trace stays as it was recorded."""
        if self.generated is None:
            return self
        return Workload(self.generated.model_copy(update={"seed": seed}), None, self.folder)

    def _requests(self, trace: TraceConfig) -> Iterator[Request]:
        path = self.folder / trace.path
        found: Iterable[Request] = read_trace(path, format=trace.trace_format, block_size=trace.block_size)
        if trace.start or trace.stop is not None:
            found = clip(found, trace.start, inf if trace.stop is None else trace.stop)
        return iter(found if trace.rate == 1 else scale_rate(found, trace.rate))


def open_set_up(path: Path) -> tuple[SetUp, Workload | None]:
    """A YAML file, whose workload may be missing, or a trace with a set-up of defaults.

    A recording's set-up has the model that served it, where none is chosen and its shape is known here.
    Raises ConfigError or WorkloadError.
    """
    set_up = load_set_up(path) if is_description(path) else SetUp(trace=TraceConfig(path=path.name))
    return with_workload(set_up, path.parent)


def with_workload(set_up: SetUp, folder: Path) -> tuple[SetUp, Workload | None]:
    """The set-up with the model that a recording names, as `open_set_up` has it, and its workload.

    folder: where a trace's relative path starts.
    """
    if set_up.workload is None and set_up.trace is None:
        return set_up, None
    served = "" if set_up.trace is None else _served(folder / set_up.trace.path, set_up.trace)
    if served and "model" not in set_up.simulation.model_fields_set and _is_known(served):
        set_up = set_up.model_copy(update={"simulation": with_changes(set_up.simulation, {"model": served})})
    return set_up, Workload(set_up.workload, set_up.trace, folder, served)


def _served(path: Path, trace: TraceConfig) -> str:
    """The model that a recording names; empty where it names none."""
    format = trace.trace_format or detect_format(path)
    return ember_trace.read_header(path).model if format is TraceFormat.EMBERKV else ""


def _is_known(model: str) -> bool:
    try:
        load_spec(model)
    except (ConfigError, UnsupportedModelError):
        return False
    return True


def required(workload: Workload | None, source: object) -> Workload:
    """Raises WorkloadError, naming the source, where there is none."""
    if workload is None:
        raise WorkloadError(f"{source}: has neither workload nor trace; one of them is needed")
    return workload


def opened(workload: WorkloadSource, settings: Mapping[str, Any]) -> tuple[SimulationConfig, Workload]:
    """The set-up and the requests of a workload. settings: keys of ``simulation``, which take precedence.

    Raises ConfigError or WorkloadError.
    """
    if isinstance(workload, Mapping):
        set_up, requests = with_workload(parse_set_up(workload, Path()), Path())
    else:
        set_up, requests = open_set_up(Path(workload))
    named = "the mapping" if isinstance(workload, Mapping) else workload
    return with_changes(set_up.simulation, settings), required(requests, named)
