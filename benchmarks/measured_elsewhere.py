"""Traces and points that others measured, kept compressed with the tests, and benchmarks against them."""

import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import arguments, report
from benchmarks.figures import Row

DATA = Path(__file__).parents[1] / "tests" / "data"
"""Sources and licences stand in its README.md."""

MOONCAKE = DATA / "mooncake_conversation.jsonl.xz"
AZURE = DATA / "azure_2023_conv.csv.xz"


def text_of(path: Path) -> str:
    """A file's text, decompressed."""
    return lzma.decompress(path.read_bytes()).decode()


def run(module: str, doc: str | None, measured: Path, rows_of: Callable[[Path], Sequence[Row]]) -> int:
    """The whole command of a benchmark against ``measured``. Returns what the command exits with."""
    given = arguments.parser(doc).parse_args()
    return report.publish(rows_of(measured), report.about(module, doc), given.out)
