"""The lines room: a file read one line at a time; what is wrong with it is told by file and line."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from emberkv.errors import WorkloadError
from emberkv.workload.request import Request

NumberedLine = tuple[int, bytes]


def numbered_lines(path: Path) -> Iterator[NumberedLine]:
    """The file's lines that are not blank, numbered from 1. Raises WorkloadError if it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror}") from error


def explain(error: ValueError) -> str:
    """What is wrong, in one line; of what pydantic found: where, what, and what was given."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = []
    for each in error.errors(include_url=False):
        where = ".".join(str(part) for part in each["loc"])
        given = repr(each["input"])
        short = given if len(given) <= 60 else f"{given[:57]}..."
        found.append(f"{where + ': ' if where else ''}{each['msg']} (given {short})")
    return "; ".join(found)


def read_requests(
    path: Path, lines: Iterable[NumberedLine], to_request: Callable[[int, bytes], Request], expected: str
) -> Iterator[Request]:
    """One request a line, in the order of arrival, each made by ``to_request(index, line)``.

    Raises WorkloadError with file, line number and ``expected`` where a line cannot be read or arrivals go back.
    """
    latest = 0.0
    for index, (number, line) in enumerate(lines):
        try:
            request = to_request(index, line)
        except ValueError as error:
            raise WorkloadError(f"{path}:{number}: {explain(error)}; expected {expected}") from error
        if request.arrival_time < latest:
            raise WorkloadError(
                f"{path}:{number}: arrives at {request.arrival_time:g} s, before the line above at {latest:g} s; "
                "expected lines sorted by arrival"
            )
        latest = request.arrival_time
        yield request
