"""A real vLLM run on an RTX 4090, replayed: 300 requests that overload the card, their queue and their tokens.

    python -m benchmarks.groundtruth [--out PREFIX]

vLLM's settings and KV blocks are those it wrote down. Efficiencies, and what else the card's data sheet does not say,
are those of H100; nothing is fitted to this run. It is simulated a second time with as many KV blocks as anyone could
ask for, to say what ignoring the limit would give. Nothing is timed here, so the machine does not matter. Exits with 1
when a mean is more than 15% off.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measured_elsewhere
from benchmarks.figures import Figure, Row

from emberkv.sim.config import SimulationConfig, TraceConfig, Workload
from emberkv.sim.outcome import Status
from emberkv.sim.run import run_simulation

RUN = measured_elsewhere.DATA / "vllm_rtx4090_llama31_8b"
TARGET = 0.15
METRICS = ("TTFT", "TPOT", "end to end")
ENOUGH_BLOCKS = 100_000


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of all requests, in milliseconds, by metric."""

    values: Mapping[str, list[float]]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric])

    def percentile(self, metric: str, percent: int) -> float:
        return statistics.quantiles(self.values[metric], n=100, method="inclusive")[percent - 1]


def measured(folder: Path) -> Latencies:
    """From the scheduler's clock, which starts when a request is queued."""
    lines = measured_elsewhere.text_of(folder / "requests.jsonl.xz").splitlines()
    return _latencies(
        (1e3 * each["queued_ts"], 1e3 * each["first_token_ts"], 1e3 * each["last_token_ts"], each["output_toks"])
        for each in map(json.loads, lines)
    )


def _latencies(requests: Iterable[tuple[float, float, float, int]]) -> Latencies:
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for arrival, first, last, tokens in requests:
        values["TTFT"].append(first - arrival)
        values["TPOT"].append((last - first) / (tokens - 1))
        values["end to end"].append(last - arrival)
    return Latencies(values)


def set_up(folder: Path, kv_blocks: int | None = None) -> SimulationConfig:
    """The engine's settings as it wrote them down. It admits first come, first served, and fills a step's budget with
    parts of prompts; prefill chunks of a few blocks come close to that.
    """
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    engine, cache = meta["engine_kwargs"], meta["kv_cache"]
    return SimulationConfig(
        model="llama-3.1-8b",
        hardware="rtx4090",
        kv_blocks=kv_blocks or cache["num_gpu_blocks"],
        block_size=cache["block_size"],
        prefill_chunk=256,
        max_step_tokens=engine["max_num_batched_tokens"],
        max_running=engine["max_num_seqs"],
        separate_long_prompts=False,
        prefix_caching=cache["enable_prefix_caching"],
    )


def simulated(folder: Path, kv_blocks: int | None = None) -> Latencies:
    workload = Workload(None, TraceConfig(path="workload.jsonl.xz"), folder)
    results = run_simulation(set_up(folder, kv_blocks), workload)
    rows = list(results.rows)
    assert all(row.status is Status.COMPLETED for row in rows)
    return _latencies(
        (row.arrival / 1e6, (row.first_token or 0) / 1e6, (row.completion or 0) / 1e6, row.output_tokens)
        for row in rows
    )


def rows_of(folder: Path) -> list[Row]:
    real, model, boundless = measured(folder), simulated(folder), simulated(folder, ENOUGH_BLOCKS)
    rows: list[Row] = []
    for metric in METRICS:
        ours, theirs = model.mean(metric), real.mean(metric)
        title = f"{metric}, mean: simulated {ours:,.1f} ms, measured {theirs:,.1f} ms; error"
        rows.append(Figure(title, "", [abs(ours / theirs - 1)], TARGET))
        for percent in (50, 99):
            ours, theirs = model.percentile(metric, percent), real.percentile(metric, percent)
            title = f"{metric}, p{percent}: simulated {ours:,.1f} ms, measured {theirs:,.1f} ms; error"
            rows.append(Figure(title, "", [ours / theirs - 1]))
        without = boundless.mean(metric)
        title = f"{metric}, mean, without the KV limit: simulated {without:,.1f} ms; error"
        rows.append(Figure(title, "", [without / real.mean(metric) - 1]))
    return rows


def main() -> int:
    return measured_elsewhere.run("benchmarks.groundtruth", __doc__, RUN, rows_of)


if __name__ == "__main__":
    sys.exit(main())
