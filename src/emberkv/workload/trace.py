"""Reads any recorded trace as one stream of requests, changes its rate, clips or merges it, and writes traces."""

import heapq
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TextIO

from emberkv.errors import WorkloadError
from emberkv.workload import azure, ember_trace, mooncake
from emberkv.workload.bounds import MOST_SECONDS
from emberkv.workload.lines import numbered_lines, uncompressed_name
from emberkv.workload.request import Request


class TraceFormat(Enum):
    """The formats of recorded traces.

    >>> [format.value for format in TraceFormat]
    ['emberkv', 'mooncake', 'azure']
    """

    EMBERKV = "emberkv"  # block hashes or token ids, sessions, limits
    MOONCAKE = "mooncake"  # prefix-chained block ids, or token ids
    AZURE = "azure"  # lengths only


def detect_format(path: Path) -> TraceFormat:
    """The format by the name and the first line.

    Raises WorkloadError naming what is accepted, or that the file cannot be read.
    """
    suffix = uncompressed_name(path).suffix
    if suffix == ".csv":
        return TraceFormat.AZURE
    if suffix != ".jsonl":
        if path.is_dir():
            raise WorkloadError(f"{path} is a folder; give a trace's file")
        raise WorkloadError(
            f"{path}: a trace's name must end with .jsonl or .csv, or with .xz or .gz after these. For another name, "
            "say the format: --from of 'emberkv workload', or format under trace in a YAML file"
        )
    _, first = next(numbered_lines(path), (1, b""))
    return TraceFormat.EMBERKV if ember_trace.is_header(first) else TraceFormat.MOONCAKE


def read_trace(
    path: Path, *, format: TraceFormat | None = None, block_size: int | None = None, scope: str | None = None
) -> Iterator[Request]:
    """The requests of a trace in the order of their arrival, one line in memory at a time.

    format: detected from the file unless given. block_size: of a Mooncake trace whose lines do not say it.
    scope: names the requests, and the ids that only this file explains; the file's name without suffix unless given.
    Raises WorkloadError naming file, line and what was expected, as the lines are read.
    """
    name = uncompressed_name(path).stem if scope is None else scope
    match format or detect_format(path):
        case TraceFormat.EMBERKV:
            return ember_trace.read(path, scope=scope or "")
        case TraceFormat.MOONCAKE:
            return mooncake.read(path, scope=name, block_size=block_size)
        case TraceFormat.AZURE:
            return azure.read(path, scope=name)


def scale_rate(requests: Iterable[Request], factor: float) -> Iterator[Request]:
    """The same requests, ``factor`` times as many a second. Think times stay: people do not think faster."""
    if not (factor > 0 and math.isfinite(factor)):
        raise WorkloadError(f"the rate's factor is {factor}; it must be above 0")
    return (replace(each, arrival_time=_bounded(each.arrival_time / factor)) for each in requests)


def _bounded(arrival: float) -> float:
    if not arrival <= MOST_SECONDS:
        raise WorkloadError(
            f"at that rate a request arrives after {arrival:g} s; at most {MOST_SECONDS:g} s are accepted"
        )
    return arrival


def clip(requests: Iterable[Request], start: float = 0.0, stop: float = math.inf) -> Iterator[Request]:
    """The requests that arrive in ``[start, stop)`` seconds; ``start`` becomes 0. Reads no further than ``stop``."""
    if not 0 <= start < stop:
        raise WorkloadError(f"a clip from {start} to {stop} s; it must start at 0 or later and end after its start")
    return _clipped(requests, start, stop)


def _clipped(requests: Iterable[Request], start: float, stop: float) -> Iterator[Request]:
    for each in requests:
        if each.arrival_time >= stop:
            return
        if each.arrival_time >= start:
            yield replace(each, arrival_time=each.arrival_time - start)


def merge(*traces: Iterable[Request]) -> Iterator[Request]:
    """Several sorted traces as one; at equal times the first trace comes first. Give each its own scope."""
    return heapq.merge(*traces, key=lambda each: each.arrival_time)


def scopes(paths: Iterable[Path]) -> list[str]:
    """A different scope for each path: its name without suffix, numbered where it comes again."""
    taken: list[str] = []
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}#{number}"
        taken.append(name)
    return taken


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
