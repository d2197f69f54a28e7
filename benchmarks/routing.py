"""Routing: what each policy reaches on known and generated traffic, and what a decision of the default one costs.

    python -m benchmarks.routing [--quick] [--part traces|decisions] [--index-blocks 10000000] [--workers 64]
                                 [--out PREFIX]

Traffic: Mooncake's conversation trace on 8 nodes of 5,859 blocks, without time and at 1.4 times its rate; the lengths
and times of Azure's conversation trace at three times its rate, each prompt behind one of 20 system prompts; generated
chat; generated coding agents. In virtual time, 8 replicas of Llama 3.1 8B serve them. A figure of the default policy
has as its target the best of all other policies, less 2%. Decisions: prompts of 100,000 tokens, of which a quarter of
the workers have a part, by the time of the processor. Exits with 1 when a target is missed.
"""

import csv
import gc
import io
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import arguments, report
from benchmarks.figures import Figure, Row
from benchmarks.measured_elsewhere import AZURE, MOONCAKE, text_of
from benchmarks.simulator import CHAT, NODE_BLOCKS

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.routing import DEFAULT_ROUTING, ROUTER_NAMES, RoutingRequest, make_router, names
from emberkv.core.hashing import BlockHash
from emberkv.sim.config import SimulationConfig, TraceConfig, Workload, with_changes
from emberkv.sim.run import run_simulation
from emberkv.workload.spec import parse_workload

REPLICAS = 8
BLOCK = 16
WORSE = 0.02
"""How much worse than the best other policy the default one may be."""
SYSTEM_PROMPTS = 20
AZURE_REQUESTS = {True: 200, False: 1000}
"""When quick, and otherwise."""
PROMPT_BLOCKS = 6250
PROMPTS = 100
"""Different ones, of which decisions are made in turn."""
EVENT_BLOCKS = 64
COLD_BYTES = 1 << 28
COLD_DECISIONS = 200

BUSY_CHAT = {**CHAT, "sessions": 400, "arrivals": {"kind": "poisson", "rate": 16.0}}
AGENTS = {
    "seed": 1, "sessions": 32, "arrivals": {"kind": "gamma", "rate": 0.8, "burstiness": 2},
    "system_prompts": {"harness": {"count": 2, "skew": 1, "tokens": 12000}},
    "clients": [{
        "name": "coder", "weight": 1, "base": "agent", "system_prompts": "harness", "max_output_tokens": 4096,
    }],
}  # fmt: skip


def azure_lines(requests: int) -> Iterator[str]:
    """Azure's lengths and times, each prompt behind a system prompt, as lines of a Mooncake trace."""
    rng = random.Random(1)
    lengths = [int(rng.lognormvariate(6.9, 0.5)) // BLOCK for _ in range(SYSTEM_PROMPTS)]
    shared = [list(range(1000 * index, 1000 * index + length)) for index, length in enumerate(lengths)]
    weights = [(index + 1) ** -1.1 for index in range(SYSTEM_PROMPTS)]
    first_own, begin = 1000 * SYSTEM_PROMPTS, None
    for number, row in enumerate(csv.DictReader(io.StringIO(text_of(AZURE)))):
        if number == requests:
            return
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        begin = begin or at
        system, own = rng.choices(shared, weights)[0], int(row["ContextTokens"])
        blocks = -(-own // BLOCK)
        yield json.dumps({
            "timestamp": int((at - begin).total_seconds() * 1000),
            "input_length": len(system) * BLOCK + own, "output_length": int(row["GeneratedTokens"]),
            "hash_ids": [*system, *range(first_own, first_own + blocks)],
        })  # fmt: skip
        first_own += blocks


def summary(changes: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """What a policy reached. imbalance: the most prompt tokens that a replica computed, against the mean."""
    config = with_changes(SimulationConfig(), {"replicas": REPLICAS, **changes})
    found = run_simulation(config, workload).summary
    computed = [replica["prefilled_tokens"] for replica in found["replicas"]]
    return {**found, "imbalance": max(computed) / sum(computed) * len(computed)}


def trace(path: Path, **how: Any) -> Workload:
    return Workload(None, TraceConfig(path=path.name, **how), path.parent)


@dataclass(frozen=True, slots=True)
class Reached:
    """What a policy reached on one traffic. hit_rate: of tokens. Times are in ms."""

    hit_rate: float
    mean: float
    p90: float
    imbalance: float
    seconds: float


def traffic(folder: Path, quick: bool) -> dict[str, tuple[dict[str, Any], Workload]]:
    azure = folder / "azure.jsonl"
    chat, agents = ({**each, "sessions": 8} if quick else each for each in (BUSY_CHAT, AGENTS))
    generated = {name: parse_workload(each, folder=folder) for name, each in (("chat", chat), ("agents", agents))}
    return {
        "Mooncake in time": ({"kv_blocks": 2000}, trace(MOONCAKE, rate=1.4, stop=60.0 if quick else 600.0)),
        "Azure behind system prompts": (
            {"kv_blocks": 4000, "hardware": "l40s"},
            trace(azure, format="mooncake", block_size=BLOCK, rate=3.0),
        ),
        "chat": ({"kv_blocks": 4000, "hardware": "l40s"}, Workload(generated["chat"], None, folder)),
        "agents": ({}, Workload(generated["agents"], None, folder)),
    }


TRAFFIC = ("Mooncake in time", "Azure behind system prompts", "chat", "agents")
"""The names in `traffic`."""


def reached(folder: Path, quick: bool, name: str, policy: str) -> Reached:
    """Replay one traffic with one policy; runs in a process of its own."""
    began = time.monotonic()
    changes, workload = traffic(folder, quick)[name]
    found = summary({**changes, "routing": policy}, workload)
    hit_rate, times = found["prefix_caching"]["token_hit_rate"], found["ttft_ms"]
    return Reached(hit_rate, times["mean"], times["p90"], found["imbalance"], time.monotonic() - began)


def pooled(quick: bool) -> tuple[float, float, float]:
    """Mooncake's blocks without time: the hit rates of one pool and of eight nodes, and the nodes' imbalance."""
    how = {"cache_only": True, "kv_blocks": NODE_BLOCKS}
    clip = trace(MOONCAKE, stop=200.0) if quick else trace(MOONCAKE)
    best = summary({**how, "kv_blocks": NODE_BLOCKS * REPLICAS, "replicas": 1}, clip)["blocks"]["hit_rate"]
    found = summary({**how, "routing": DEFAULT_ROUTING}, clip)
    return best, found["blocks"]["hit_rate"], found["imbalance"]


def pooled_rows(best: float, hit_rate: float, imbalance: float) -> list[Row]:
    name = f"Mooncake, 8 nodes, {DEFAULT_ROUTING}"
    return [
        Figure("Mooncake, one pool of the same size: hit rate", "", [best]),
        Figure(f"{name}: hit rate", "", [hit_rate], 0.97 * best, at_least=True),
        Figure(f"{name}: largest node's work against the mean", "", [imbalance], 1.15),
    ]


def policy_rows(name: str, found: dict[str, Reached]) -> Iterator[Row]:
    """Each figure of the default policy against the best that any other policy reaches on the same traffic."""
    ours = found[DEFAULT_ROUTING]
    others = {policy: each for policy, each in found.items() if policy != DEFAULT_ROUTING}
    best = max(others, key=lambda policy: others[policy].hit_rate)
    target = (1 - WORSE) * others[best].hit_rate
    yield Figure(f"{name}: hit rate; best other {best}", "", [ours.hit_rate], target, at_least=True)
    for title, figure in (("mean", attrgetter("mean")), ("p90", attrgetter("p90"))):
        best = min(others, key=lambda policy: figure(others[policy]))
        target = (1 + WORSE) * figure(others[best])
        yield Figure(f"{name}: TTFT {title}; best other {best}", "ms", [figure(ours)], target)
    yield Figure(f"{name}: largest replica's work against the mean", "", [ours.imbalance])


def trace_rows(quick: bool) -> list[Row]:
    """All traffic with all policies, as many at a time as there are processors."""
    policies = (*ROUTER_NAMES[:2], DEFAULT_ROUTING) if quick else ROUTER_NAMES
    with tempfile.TemporaryDirectory() as made, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        folder = Path(made)
        (folder / "azure.jsonl").write_text("\n".join(azure_lines(AZURE_REQUESTS[quick])) + "\n")
        whole = pool.submit(pooled, quick)
        runs = {
            (name, policy): pool.submit(reached, folder, quick, name, policy) for name in TRAFFIC for policy in policies
        }
        rows = pooled_rows(*whole.result())
        for name in TRAFFIC:
            found = {policy: runs[name, policy].result() for policy in policies}
            seconds = ", ".join(f"{policy} {each.seconds:.0f}" for policy, each in found.items())
            print(f"{name}: seconds taken: {seconds}", file=sys.stderr, flush=True)
            rows += policy_rows(name, found)
        return rows


def indexed(index: BlockIndex, blocks: int, workers: int, prompts: int) -> tuple[list[list[BlockHash]], list[float]]:
    """Index as many blocks as asked for, event by event. Returns prompts whose leading blocks a quarter of the workers
    have, to different depths, and the seconds that each event took, without garbage collection.
    """
    rng = random.Random(1)
    chains: list[list[BlockHash]] = []
    seconds: list[float] = []

    def add(worker: int, chain: list[BlockHash]) -> None:
        for begin in range(0, len(chain), EVENT_BLOCKS):
            event = chain[begin : begin + EVENT_BLOCKS]
            began = time.process_time()
            index.add(worker, event)
            seconds.append(time.process_time() - began)

    while len(index) < blocks:
        drawn = rng.randbytes(32 * PROMPT_BLOCKS)
        chain = [drawn[begin : begin + 32] for begin in range(0, len(drawn), 32)]
        add(rng.randrange(workers), chain)
        if len(chains) < prompts:
            chains.append(chain)
            for worker in rng.sample(range(workers), workers // 4):
                add(worker, chain[: rng.randrange(PROMPT_BLOCKS)])
    return chains, seconds


def decision_rows(blocks: int, workers: int, decisions: int) -> list[Row]:
    """Long prompts over many workers, with so many blocks in the index. Before a decision with empty caches, other
    memory is read, more than any cache of a processor holds, so that not even the interpreter is in one.
    """
    rng = random.Random(2)
    router = make_router(DEFAULT_ROUTING, rng, names(workers))
    index = router.index
    assert index is not None
    gc.disable()
    chains, seconds = indexed(index, blocks, workers, min(decisions, PROMPTS))
    gc.freeze()  # a gateway does not hold the prompts' lists, which take long to go through
    gc.enable()
    states = [ReplicaState(prefill_rate=20_000.0, queued_tokens=rng.randrange(50_000)) for _ in range(workers)]
    elsewhere = np.ones(COLD_BYTES // 8)
    taken: dict[str, list[float]] = {"warm": [], "empty": []}
    index.probes, clock = 0, itertools.count()
    for caches, times in taken.items():
        for number in range(decisions if caches == "warm" else min(decisions, COLD_DECISIONS)):
            prompt = _Prompt(chains[number % len(chains)])
            request = RoutingRequest(prompt, PROMPT_BLOCKS * BLOCK, now=10.0 * next(clock))
            if caches == "empty":
                elsewhere.sum()
            began = time.process_time()
            router.decide(request, states)
            times.append(1e3 * (time.process_time() - began))
    title = f"{PROMPT_BLOCKS:,} blocks, {workers} workers, {len(index):,} blocks indexed"
    rows: list[Row] = []
    for caches, times in taken.items():
        name = f"{title}: a decision, {caches} caches"
        rows += [
            Figure(f"{name}, least", "ms", [min(times)]),
            Figure(f"{name}, p50", "ms", [statistics.median(times)]),
            Figure(f"{name}, p99", "ms", [statistics.quantiles(times, n=100)[98]], 1.0 if caches == "warm" else None),
        ]
    event = f"{title}: to index {EVENT_BLOCKS} blocks"
    return [
        *rows,
        Figure(f"{title}: rows looked up for a decision", "", [index.probes / sum(map(len, taken.values()))]),
        Figure(f"{title}: memory of an indexed block", "bytes", [index.nbytes / len(index)]),
        Figure(f"{event}, p50", "ms", [1e3 * statistics.median(seconds)]),
        Figure(f"{event}, most, growing included", "ms", [1e3 * max(seconds)], 2.0),
    ]


class _Prompt:
    """As much of a `Chain` as routing reads."""

    block_size = BLOCK

    def __init__(self, block_hashes: list[BlockHash]) -> None:
        self.block_hashes = block_hashes


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--part", choices=["traces", "decisions"], help="default: both")
    parser.add_argument("--index-blocks", type=int, default=10_000_000, help="for the decisions")
    parser.add_argument("--workers", type=int, default=64, help="for the decisions")
    given = parser.parse_args()
    rows: list[Row] = []
    if given.part != "decisions":
        rows += trace_rows(given.quick)
    if given.part != "traces":
        blocks, decisions = (20_000, 50) if given.quick else (given.index_blocks, 1000)
        rows += decision_rows(blocks, given.workers, decisions)
    return report.publish(rows, report.about("benchmarks.routing", __doc__), given.out)


if __name__ == "__main__":
    sys.exit(main())
