"""Azure traces: CSV of arrival, prompt and answer lengths, without anything on shared prefixes."""

import csv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel

from emberkv.errors import WorkloadError
from emberkv.workload import bounds
from emberkv.workload.content import Content
from emberkv.workload.lines import NumberedLine, numbered_lines, read_requests
from emberkv.workload.request import Request

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
EXPECTED = f"{','.join(COLUMNS)}, such as 2023-11-16 18:15:46.6805900,374,44"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Row(BaseModel):
    """Seconds are read to the microsecond; a time without a zone is taken for UTC."""

    TIMESTAMP: datetime
    ContextTokens: bounds.Tokens
    GeneratedTokens: bounds.Tokens


def _check_header(path: Path, lines: Iterator[NumberedLine]) -> None:
    number, line = next(lines, (1, b""))
    names = tuple(line.decode("utf-8-sig", "replace").strip().split(","))
    if names != COLUMNS:
        raise WorkloadError(f"{path}:{number}: the header is {','.join(names)!r}; expected {','.join(COLUMNS)!r}")


def read(path: Path, *, scope: str) -> Iterator[Request]:
    """The requests of a trace, in constant memory; the first arrives at 0.

    scope: names the requests. Raises WorkloadError naming file, line and what was expected.
    """
    lines = numbered_lines(path)
    _check_header(path, lines)
    first: datetime | None = None

    def to_request(index: int, line: bytes) -> Request:
        nonlocal first
        fields = next(csv.reader([line.decode()]))
        if len(fields) != len(COLUMNS):
            raise ValueError(f"there are {len(fields)} fields")
        row = _Row.model_validate(dict(zip(COLUMNS, fields, strict=True)))
        moment = row.TIMESTAMP if row.TIMESTAMP.tzinfo else row.TIMESTAMP.replace(tzinfo=UTC)
        if first is None:
            first = moment
        arrival = (moment - first).total_seconds()
        if arrival > bounds.MOST_SECONDS:
            raise ValueError(
                f"it arrives {arrival:g} s after the first; at most {bounds.MOST_SECONDS:g} s are accepted"
            )
        return Request(
            request_id=f"{scope}-{index}",
            arrival_time=arrival,
            prompt_tokens=row.ContextTokens,
            output_tokens=row.GeneratedTokens,
            max_output_tokens=row.GeneratedTokens,
            content=Content(),
        )

    yield from read_requests(path, lines, to_request, EXPECTED)


def write(file: TextIO, requests: Iterable[Request]) -> int:
    """Write arrivals, as times from 1970 on, and lengths; returns how many. All else is lost."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    count = 0
    for request in requests:
        moment = EPOCH + timedelta(seconds=request.arrival_time)
        rows.writerow([f"{moment:%Y-%m-%d %H:%M:%S.%f}", request.prompt_tokens, request.output_tokens])
        count += 1
    return count
