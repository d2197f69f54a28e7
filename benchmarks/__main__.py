"""Runs the benchmarks one after another and writes docs/benchmarks.md.

    python -m benchmarks [--vllm-python VENV/bin/python] [--llama-cpp FOLDER] [--only NAME ...] [--quick]

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
from collections.abc import Collection
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


PEERS = {"vs_llama_cpp": "--llama-cpp", "vs_vllm": "--vllm-python"}
"""Benchmarks that need another server, and the option that says where it is."""

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
    Benchmark("vs_llama_cpp", quick=("--rounds", "1", "--samples", "1")),
    Benchmark(
        "vs_vllm",
        ("--rounds", "3", "--samples", "4"),
        quick=("--rounds", "1", "--samples", "1"),
    ),
)
NAMES = [benchmark.name for benchmark in BENCHMARKS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, help="of vLLM's environment; without it vs_vllm is left out")
    parser.add_argument("--llama-cpp", type=Path, help="of llama.cpp's programs; without it vs_llama_cpp is left out")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    given = parser.parse_args()
    for name in set(given.only or ()) & PEERS.keys() - peers(given).keys():
        parser.error(f"{name} needs {PEERS[name]}")
    return given


def peers(given: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The arguments that say where another server is, by the benchmark that compares with it."""
    places = {name: getattr(given, option[2:].replace("-", "_")) for name, option in PEERS.items()}
    return {name: (PEERS[name], str(place.absolute())) for name, place in places.items() if place is not None}


def chosen(only: list[str] | None, given_peers: Collection[str]) -> list[Benchmark]:
    """Those named, or all; a comparison with another server only where it is among ``given_peers``."""
    possible = set(only or NAMES) - (PEERS.keys() - set(given_peers))
    return [each for each in BENCHMARKS if each.name in possible]


def run_all(given: argparse.Namespace, results: Path) -> bool:
    """Returns whether all succeeded."""
    places = peers(given)
    succeeded = [
        benchmark.run(results / benchmark.name, places.get(benchmark.name, ()), quick=given.quick)
        for benchmark in chosen(given.only, places)
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
