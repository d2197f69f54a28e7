"""Files that others measured, which lie beside the project where they are at hand, and benchmarks against them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import arguments, report
from benchmarks.figures import Row

DATA = Path(__file__).parents[2] / "shared" / "data"


def run(module: str, doc: str | None, measured: Path, rows_of: Callable[[Path], Sequence[Row]]) -> int:
    """The whole command of a benchmark against ``measured``, a path below the data; without it, publishes nothing.

    Returns what the command exits with.
    """
    parser = arguments.parser(doc)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with groundtruth/")
    given = parser.parse_args()
    path = given.data / measured
    if not path.exists():
        print(f"left out: no {path}", file=sys.stderr)
        return 0
    about = report.about(module, doc)
    return report.publish(rows_of(path), about, given.out)
