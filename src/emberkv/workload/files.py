"""Opens any workload file, recorded or described, as requests or as a source, and writes traces."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from emberkv.errors import WorkloadError
from emberkv.workload import azure, ember_trace, mooncake
from emberkv.workload.request import Request
from emberkv.workload.source import ClosedLoopTraceSource, GeneratedSource, Source, TraceSource, unroll
from emberkv.workload.spec import load_workload
from emberkv.workload.trace import TraceFormat, read_trace

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Seconds that a request is assumed to take where nothing simulates it."""

    first_token: float
    per_token: float


ASSUMED = ServiceTime(first_token=0.5, per_token=0.02)


def is_description(path: Path) -> bool:
    """Whether the file describes a workload (YAML), rather than being a trace."""
    return path.suffix in YAML_SUFFIXES


def open_source(
    path: Path, *, format: TraceFormat | None = None, block_size: int | None = None, closed_loop: bool = False
) -> Source:
    """What a simulation draws from. Conversations that are generated always wait for their answers.

    closed_loop: in a trace that tells who follows whom, follow-ups wait too, instead of arriving as recorded.
    Raises WorkloadError, for a trace also while it is read.
    """
    if is_description(path):
        return GeneratedSource(load_workload(path))
    requests = read_trace(path, format=format, block_size=block_size)
    return ClosedLoopTraceSource(requests) if closed_loop else TraceSource(requests)


def open_requests(
    path: Path,
    *,
    format: TraceFormat | None = None,
    block_size: int | None = None,
    scope: str | None = None,
    service: ServiceTime = ASSUMED,
) -> Iterator[Request]:
    """All requests by arrival: a trace's, or a described workload's if each takes ``service``. Raises WorkloadError."""
    if is_description(path):
        source = GeneratedSource(load_workload(path))
        return unroll(source, first_token=service.first_token, per_token=service.per_token)
    return read_trace(path, format=format, block_size=block_size, scope=scope)


def write_trace(
    path: Path,
    requests: Iterable[Request],
    *,
    format: TraceFormat = TraceFormat.EMBERKV,
    block_size: int | None = None,
    note: str = "",
) -> int:
    """Write a trace, whole or not at all; returns how many requests it has.

    block_size: tokens of a block; by default each request's own. note: kept in emberkv's own format only.
    Raises WorkloadError when the file cannot be written.
    """
    with _replacing(path) as file:
        match format:
            case TraceFormat.EMBERKV:
                return ember_trace.write(file, requests, block_size=block_size, note=note)
            case TraceFormat.MOONCAKE:
                return mooncake.write(file, requests, block_size=block_size)
            case TraceFormat.AZURE:
                return azure.write(file, requests)


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` once it is complete."""
    draft = path.with_name(f"{path.name}.part")
    try:
        try:
            with draft.open("w", encoding="utf-8", newline="") as file:
                yield file
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise WorkloadError(f"cannot write {path}: {error.strerror}") from error
