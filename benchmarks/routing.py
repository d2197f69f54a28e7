"""Routing: what each policy reaches on known and generated traffic, and what a decision of the default one costs.

    python -m benchmarks.routing [--quick] [--part traces|decisions] [--blocks 10000000] [--out PREFIX]

Traffic: Mooncake's conversation trace on 8 nodes of 5,859 blocks, without time and at 1.4 times its rate; the lengths
and times of Azure's conversation trace at three times its rate, each prompt behind one of 20 system prompts; generated
chat; generated coding agents. In virtual time, 8 replicas of Llama 3.1 8B serve them. A figure of the default policy
has as its target the best of all other policies, less 2%. Decisions: prompts of 100,000 tokens over 64 workers, by the
time of the processor. Exits with 1 when a target is missed.
"""

import csv
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import arguments, report
from benchmarks.figures import Figure, Row
from benchmarks.measured_elsewhere import AZURE, MOONCAKE, text_of
from benchmarks.simulator import CHAT, NODE_BLOCKS

from emberkv.cluster.policies import ReplicaState
from emberkv.cluster.routing import DEFAULT_ROUTING, ROUTER_NAMES, RoutingRequest, make_router, names
from emberkv.core.hashing import BlockHash
from emberkv.sim.config import SimulationConfig, TraceConfig, with_changes
from emberkv.sim.inputs import Workload
from emberkv.sim.run import run_simulation
from emberkv.workload.spec import parse_workload

REPLICAS = 8
BLOCK = 16
WORSE = 0.02
"""How much worse than the best other policy the default one may be."""
SYSTEM_PROMPTS = 20
PROMPT_BLOCKS, WORKERS = 6250, 64

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


def pooled_rows(quick: bool) -> list[Row]:
    how = {"cache_only": True, "kv_blocks": NODE_BLOCKS}
    clip = trace(MOONCAKE, stop=200.0) if quick else trace(MOONCAKE)
    pooled = summary({**how, "kv_blocks": NODE_BLOCKS * REPLICAS, "replicas": 1}, clip)["blocks"]["hit_rate"]
    found = summary({**how, "routing": DEFAULT_ROUTING}, clip)
    name = f"Mooncake, 8 nodes, {DEFAULT_ROUTING}"
    return [
        Figure("Mooncake, one pool of the same size: hit rate", "", [pooled]),
        Figure(f"{name}: hit rate", "", [found["blocks"]["hit_rate"]], 0.97 * pooled, at_least=True),
        Figure(f"{name}: largest node's work against the mean", "", [found["imbalance"]], 1.15),
    ]


def traffic(folder: Path, quick: bool) -> dict[str, tuple[dict[str, Any], Workload]]:
    azure = folder / "azure.jsonl"
    azure.write_text("\n".join(azure_lines(200 if quick else 4000)) + "\n")
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


def policy_rows(quick: bool) -> Iterator[Row]:
    """For each traffic, each figure of the default policy against the best that any other policy reaches."""
    with tempfile.TemporaryDirectory() as made:
        for name, (changes, workload) in traffic(Path(made), quick).items():
            others = ROUTER_NAMES[:2] if quick else [each for each in ROUTER_NAMES if each != DEFAULT_ROUTING]
            found = {each: summary({**changes, "routing": each}, workload) for each in (*others, DEFAULT_ROUTING)}
            ours = found.pop(DEFAULT_ROUTING)
            hits = {each: of["prefix_caching"]["token_hit_rate"] for each, of in found.items()}
            best = max(hits, key=lambda each: hits[each])
            target = (1 - WORSE) * hits[best]
            rate = ours["prefix_caching"]["token_hit_rate"]
            yield Figure(f"{name}: hit rate; best other {best}", "", [rate], target, at_least=True)
            for figure in ("mean", "p90"):
                times = {each: of["ttft_ms"][figure] for each, of in found.items()}
                best = min(times, key=lambda each: times[each])
                target = (1 + WORSE) * times[best]
                yield Figure(f"{name}: TTFT {figure}; best other {best}", "ms", [ours["ttft_ms"][figure]], target)
            yield Figure(f"{name}: largest replica's work against the mean", "", [ours["imbalance"]])


def decision_rows(blocks: int, decisions: int) -> list[Row]:
    """Prompts whose leading blocks many workers have, to different depths, among as many blocks as asked for."""
    rng = random.Random(1)
    router = make_router(DEFAULT_ROUTING, rng, names(WORKERS))
    index = router.index
    assert index is not None
    chains: list[list[BlockHash]] = []
    began = time.process_time()
    while len(index) < blocks:
        chain = [rng.randbytes(32) for _ in range(PROMPT_BLOCKS)]
        index.add(rng.randrange(WORKERS), chain)
        if len(chains) < decisions:
            chains.append(chain)
            for worker in rng.sample(range(WORKERS), 16):
                index.add(worker, chain[: rng.randrange(PROMPT_BLOCKS)])
    built = (time.process_time() - began) / len(index)
    states = [ReplicaState(prefill_rate=20_000.0, queued_tokens=rng.randrange(50_000)) for _ in range(WORKERS)]
    taken = []
    for number in range(decisions):
        request = RoutingRequest(_Prompt(chains[number % len(chains)]), PROMPT_BLOCKS * BLOCK, now=10.0 * number)
        began = time.process_time()
        router.decide(request, states)
        taken.append(1e3 * (time.process_time() - began))
    title = f"{PROMPT_BLOCKS:,} blocks, {WORKERS} workers, {len(index):,} blocks indexed"
    return [
        Figure(f"{title}: a decision, p50", "ms", [statistics.median(taken)]),
        Figure(f"{title}: a decision, p99", "ms", [statistics.quantiles(taken, n=100)[98]], 1.0),
        Figure(f"{title}: memory of an indexed block", "bytes", [index.nbytes / len(index)]),
        Figure(f"{title}: to index a block", "us", [1e6 * built]),
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
    parser.add_argument("--blocks", type=int, default=10_000_000, help="blocks in the index")
    given = parser.parse_args()
    rows: list[Row] = []
    if given.part != "decisions":
        rows += [*pooled_rows(given.quick), *policy_rows(given.quick)]
    if given.part != "traces":
        rows += decision_rows(20_000 if given.quick else given.blocks, 50 if given.quick else 1000)
    return report.publish(rows, report.about("benchmarks.routing", __doc__), given.out)


if __name__ == "__main__":
    sys.exit(main())
