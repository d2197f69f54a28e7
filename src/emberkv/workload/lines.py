"""A file read one line at a time; an error names the file, the line and what was expected."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path

from pydantic import ValidationError

from emberkv.errors import WorkloadError
from emberkv.validation import describe
from emberkv.workload.request import Request

NumberedLine = tuple[int, bytes]

COMPRESSED = (".xz", ".gz")
MOST_LINE_BYTES = 64 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def uncompressed_name(path: Path) -> Path:
    """``trace.jsonl`` for ``trace.jsonl.xz``; other names as they are."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def numbered_lines(path: Path) -> Iterator[NumberedLine]:
    """The file's lines that are not blank, numbered from 1, without a byte-order mark; .xz and .gz are decompressed.

    Raises WorkloadError if the file cannot be read or a line is longer than `MOST_LINE_BYTES`.
    """
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > MOST_LINE_BYTES:
                    raise WorkloadError(f"{path}:{number}: the line is longer than {MOST_LINE_BYTES // 2**20} MiB")
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise WorkloadError(f"cannot read {path}: {error.strerror or error}") from error
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise WorkloadError(f"cannot read {path}: it is damaged, or not compressed as its name says") from error


def _opened(path: Path) -> BufferedIOBase:
    match path.suffix:
        case ".xz":
            return lzma.open(path)
        case ".gz":
            return gzip.open(path)
    return path.open("rb")


def explain(error: ValueError | OverflowError) -> str:
    """An error in one line; errors of pydantic are put as `describe` does."""
    return describe(error) if isinstance(error, ValidationError) else str(error)


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
        except (ValueError, OverflowError) as error:
            raise WorkloadError(f"{path}:{number}: {explain(error)}; expected {expected}") from error
        if request.arrival_time < latest:
            raise WorkloadError(
                f"{path}:{number}: arrives at {request.arrival_time:g} s, before the line above at {latest:g} s; "
                "expected lines sorted by arrival"
            )
        latest = request.arrival_time
        yield request
