"""The simulator: how fast it is, in how much memory, and what it says of known traces.

    python -m benchmarks.simulator [--quick] [--rounds 3] [--trace FILE] [--out PREFIX]

Each case runs in a process of its own, on one core; its time is that of `emberkv.sim.run.run_simulation` with a CSV
file written, reading the workload included. The trace is Mooncake's conversation trace (FAST25 release), kept with the
tests. Exits with 1 when a target is missed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import arguments, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.measured_elsewhere import MOONCAKE

from emberkv.sim.config import SimulationConfig, TraceConfig, Workload, with_changes
from emberkv.sim.run import run_simulation
from emberkv.workload.spec import parse_workload

MILLION = 1_000_000
NODE_BLOCKS = 5_859
LRU_RATES = {
    1_000: 0.0445,
    3_000: 0.0653,
    6_000: 0.1393,
    10_000: 0.2116,
    30_000: 0.3257,
    50_000: 0.3546,
    100_000: 0.3637,
}
ROUTING = ("random", "round-robin", "least-loaded", "longest-prefix", "prefix-minus-load", "consistent-hashing",
           "expected-ttft")  # fmt: skip

CHAT = {
    "seed": 1, "sessions": 1000, "arrivals": {"kind": "poisson", "rate": 2.0},
    "system_prompts": {
        "products": {"count": 20, "skew": 1.1, "tokens": {"kind": "lognormal", "median": 900, "p90": 2500}},
    },
    "clients": [{
        "name": "chat", "weight": 1, "system_prompts": "products", "max_output_tokens": 1024, "max_context": 16384,
        "message": {"kind": "lognormal", "median": 60, "p90": 400},
        "output": {"kind": "lognormal", "median": 180, "p90": 500},
        "turns": {"kind": "geometric", "mean": 3}, "think_time": {"kind": "lognormal", "median": 20, "p90": 90},
    }],
}  # fmt: skip
"""Conversations of 3 turns on average, over shared system prompts."""

SHORT = {
    "seed": 1, "sessions": MILLION // 2, "arrivals": {"kind": "poisson", "rate": 200.0},
    "clients": [{"name": "short", "weight": 1, "message": 40, "output": 8, "turns": 2, "think_time": 5}],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A set-up and its requests: a described workload, or None for the trace."""

    changes: dict[str, Any]
    workload: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """seconds: of the processor. peak_mib: of the whole process."""

    seconds: float
    peak_mib: float
    summary: dict[str, Any] = field(repr=False)


def run_here(case: Case, trace: Path) -> Outcome:
    if case.workload is None:
        workload = Workload(None, TraceConfig(path=trace.name), trace.parent)
    else:
        workload = Workload(parse_workload(case.workload, folder=Path()), None, Path())
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        config = with_changes(SimulationConfig(), case.changes)
        results = run_simulation(config, workload, csv_file=Path(folder) / "rows.csv")
        seconds = time.process_time() - begin
    summary = {name: found for name, found in results.summary.items() if name != "memory_over_time"}
    uncached = [replica["prefilled_tokens"] for replica in summary["replicas"]]
    summary["imbalance"] = max(uncached) / sum(uncached) * results.config.replicas
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Outcome(seconds, peak, summary)


def run(case: Case, trace: Path) -> Outcome:
    """In a process of its own."""
    described = json.dumps({"changes": case.changes, "workload": case.workload})
    command = [sys.executable, "-m", "benchmarks.simulator", "--trace", str(trace), "--case", described]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return Outcome(**json.loads(found.stdout))


def speed(name: str, case: Case, trace: Path, rounds: int, target: float | None = None) -> list[Row]:
    taken = [run(case, trace) for _ in range(rounds)]
    served = taken[0].summary["requests"]["completed"]
    title = f"{name}: {served:,} requests"
    return [
        Figure(title, "s", [each.seconds for each in taken], target),
        Figure(f"{title}, peak memory", "MiB", [each.peak_mib for each in taken]),
    ]


def trace_rows(trace: Path, rounds: int, *, quick: bool) -> list[Row]:
    rows = [
        *speed("conversation trace, 8 replicas, full timing", Case({"replicas": 8}), trace, rounds, 10.0),
        *speed("conversation trace, cache only", Case({"cache_only": True, "kv_blocks": 30_000}), trace, rounds, 2.0),
    ]
    for capacity, rate in list(LRU_RATES.items())[: 1 if quick else None]:
        found = run(Case({"cache_only": True, "kv_blocks": capacity}), trace).summary["blocks"]["hit_rate"]
        rows.append(Figure(f"LRU, {capacity:,} blocks: hit rate, published {rate}", "", [found]))
    for name in ROUTING[: 1 if quick else None]:
        changes = {"cache_only": True, "kv_blocks": NODE_BLOCKS, "replicas": 8, "routing": name}
        found = run(Case(changes), trace).summary
        rows.append(Figure(f"8 nodes, {name}: hit rate", "", [found["blocks"]["hit_rate"]]))
        rows.append(Figure(f"8 nodes, {name}: largest node's work against the mean", "", [found["imbalance"]]))
    return rows


def benefit_rows(trace: Path) -> list[Row]:
    """The same conversations with the cache and without; every request completes in both."""
    on, off = (run(Case({"prefix_caching": each}, CHAT), trace).summary for each in (True, False))
    assert on["requests"] == off["requests"]
    assert on["requests"]["completed"] == on["requests"]["total"]
    rows: list[Row] = [
        Figure("conversations, cache on: hit rate", "", [on["prefix_caching"]["token_hit_rate"]]),
        Figure("conversations, cache on: prefill reduction", "", [on["prefix_caching"]["prefill_reduction_ratio"]]),
    ]
    for figure in ("mean", "p50", "p99"):
        values = [on["ttft_ms"][figure]], [off["ttft_ms"][figure]]
        rows.append(Comparison(f"conversations, TTFT {figure}", "ms", "cache on", values[0], "cache off", values[1]))
    return rows


def measure(trace: Path, rounds: int, *, quick: bool) -> list[Row]:
    many = {**SHORT, "sessions": 500} if quick else SHORT
    eight = {"replicas": 8, "routing": "least-loaded"}
    thousand = {"replicas": 1000, "routing": "bounded-hashing", "kv_blocks": 2_000}
    return [
        *trace_rows(trace, rounds, quick=quick),
        *benefit_rows(trace),
        *speed("generated, 8 replicas", Case(eight, many), trace, 1),
        *speed("generated, 1,000 replicas", Case(thousand, {**SHORT, "sessions": 500 if quick else 10_000}), trace, 1),
    ]


def main() -> int:
    parser = arguments.parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="one round, of little")
    parser.add_argument("--trace", type=Path, default=MOONCAKE)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        found = run_here(Case(**json.loads(given.case)), given.trace)
        print(json.dumps({"seconds": found.seconds, "peak_mib": found.peak_mib, "summary": found.summary}))
        return 0
    rounds = 1 if given.quick else given.rounds
    about = report.about("benchmarks.simulator", __doc__, rounds=rounds, trace=given.trace.name)
    return report.publish(measure(given.trace, rounds, quick=given.quick), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
