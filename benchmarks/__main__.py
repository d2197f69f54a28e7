"""Runs the benchmarks one after another and writes docs/benchmarks.md.

    python -m benchmarks [--vllm-python VENV/bin/python] [--only NAME ...] [--quick]

Nothing else may run on the machine meanwhile. Results are kept in build/benchmarks, and the page is made of all that
lie there: with --only, the others stay as they were measured before. --quick only tries whether everything runs; it
keeps nothing and shows the page instead of writing it. Exits with 1 when a benchmark fails or misses a target.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
NOTES = ROOT / "benchmarks" / "notes.md"
BUSY = 0.5


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this package, with its arguments for a measurement and for a mere try."""

    name: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()

    def run(self, out: Path, more: tuple[str, ...], *, quick: bool) -> bool:
        """Runs it in a process of its own. Returns whether it published results and met all targets."""
        arguments = (*(self.quick if quick else self.arguments), *more)
        result = out.with_suffix(".json")
        result.unlink(missing_ok=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{self.name}", *arguments, "--out", str(out)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        outcome = ("all targets met" if code == 0 else "targets missed") if result.exists() else "failed"
        print(f"{self.name}: {outcome} after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        return code == 0


VLLM = "vs_vllm"
BENCHMARKS = (
    Benchmark("core", quick=("--repeats", "1")),
    Benchmark("ram_cache", quick=("--quick",)),
    Benchmark("disk_open", quick=("--blocks", "2000", "--rounds", "1")),
    Benchmark("shared_tiers", quick=("--blocks", "16", "--rounds", "1")),
    Benchmark("simulator", quick=("--quick",)),
    Benchmark("routing", quick=("--quick",)),
    Benchmark("cluster", quick=("--quick",)),
    Benchmark("prefill", quick=("--repeats", "1", "--alignments", "1")),
    Benchmark("quantised_quality", quick=("--tokens", "200")),
    Benchmark("constrained", quick=("--rounds", "1", "--tokens", "40")),
    Benchmark("memory", quick=("--cache-ram", "64MiB", "--requests", "400")),
    Benchmark(
        "serving_ratios",
        ("--rounds", "3", "--alignments", "12"),
        quick=("--rounds", "1", "--alignments", "1"),
    ),
    Benchmark("h100_points"),
    Benchmark("groundtruth"),
    Benchmark("this_machine", quick=("--sessions", "4", "--rounds", "1")),
    Benchmark("restart", ("--rounds", "3"), quick=("--rounds", "1", "--samples", "1")),
    Benchmark("prober", quick=("--samples", "6", "--tokens", "200", "--rounds", "1")),
    Benchmark(
        VLLM,
        ("--rounds", "3", "--samples", "4"),
        quick=("--rounds", "1", "--samples", "1"),
    ),
)
NAMES = [benchmark.name for benchmark in BENCHMARKS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, help=f"of vLLM's environment; without it {VLLM} is left out")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    given = parser.parse_args()
    if given.only and VLLM in given.only and not given.vllm_python:
        parser.error(f"{VLLM} needs --vllm-python")
    return given


def chosen(only: list[str] | None, *, vllm: bool) -> list[Benchmark]:
    """Those named, or all; the comparison with vLLM only where there is one."""
    return [each for each in BENCHMARKS if each.name in (only or NAMES) and (vllm or each.name != VLLM)]


def run_all(given: argparse.Namespace, results: Path) -> bool:
    """Returns whether all succeeded."""
    python = () if given.vllm_python is None else ("--vllm-python", str(given.vllm_python.absolute()))
    succeeded = [
        benchmark.run(results / benchmark.name, python if benchmark.name == VLLM else (), quick=given.quick)
        for benchmark in chosen(given.only, vllm=bool(python))
    ]
    return all(succeeded)


def main() -> int:
    given = arguments()
    if os.getloadavg()[0] > BUSY:
        print(f"something else is running (load {os.getloadavg()[0]:.1f}); figures will be worse", file=sys.stderr)
    notes = NOTES.read_text()
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            succeeded = run_all(given, Path(folder))
            print(report.page(Path(folder), NAMES, notes))
    else:
        succeeded = run_all(given, RESULTS)
        PAGE.write_text(report.page(RESULTS, NAMES, notes))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
