"""Prefill in this process: rates by chunk size, against transformers' own forward pass, with and without the kernels.

    python -m benchmarks.prefill [--models FOLDER ...] [--chunk 128] [--repeats 3] [--alignments 8] [--out PREFIX]

Ours is what a server does between a request's arrival and its first token, less HTTP and sampling: hashing, matching,
scheduling, computing, committing. Theirs is the model as transformers loads it, with SDPA and a DynamicCache, called
chunk by chunk for one row of logits. All prompts are random tokens, and those called cold are new. Without --models,
a random Qwen2 (written if missing) and the bundled demo model, in the dtypes they are stored in. Exits with 1 when a
target is missed.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

import torch
from benchmarks import arguments, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.random_qwen2 import ensure_model
from transformers import AutoConfig, DynamicCache

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence as Served
from emberkv.defaults import DEFAULT_PREFILL_CHUNK
from emberkv.engine.torch.assembly import CacheSizes, ModelOptions, load_configured
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import load_model

BLOCK_SIZE = 16
STEP_TOKENS = 512
CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
SHORT, LONG = 2048, 6600
CONTEXT, TURN = 8000, 32
SPAN = 256  # cached lengths are drawn from CONTEXT +- SPAN / 2, so that every way to fall on a unit of reuse occurs
SHARE_OF_BEST = 0.9
SHARE_OF_PLAIN = 0.9
Prompts = Callable[[int], list[int]]


class Ours:
    """The scheduler and an engine with a model of its own, driven by the caller.

    tokens: what the pool holds at least. native: whether the C++ kernels compute, where they can.
    """

    def __init__(self, folder: Path, *, chunk: int, tokens: int, native: bool = True) -> None:
        options = ModelOptions(model=str(folder), kernels="auto" if native else "torch")
        loaded, kernels = load_configured(options, CacheSizes(), lambda _: None)
        tokens = max(tokens + BLOCK_SIZE, 4 * chunk)  # room for an answer, and for what the engine tries at its start
        cache_bytes = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
        self._root = root_hash(loaded.fingerprint, BLOCK_SIZE)
        self._engine = TorchEngine(
            loaded, cache_bytes=cache_bytes, block_size=BLOCK_SIZE, prefill_chunk=chunk, kernels=kernels
        )
        pool = BlockPool(self._engine.pool.num_blocks, BLOCK_SIZE)
        cache = PrefixCache(pool, alignment=self._engine.alignment)
        self._scheduler = Scheduler(cache, SchedulerConfig(chunk, max(chunk, STEP_TOKENS)))
        self.unit = self._engine.alignment

    def seconds(self, prompt: list[int], *, cached: int = 0) -> float:
        """To the scores of the first token. Raises RuntimeError unless the hit is ``cached`` tokens, rounded down."""
        begin = time.perf_counter()
        sequence = Served("prefill", TokenChain(self._root, prompt, BLOCK_SIZE), max_new_tokens=1)
        self._scheduler.add(sequence)
        while sequence.finish_reason is None:
            plan = self._scheduler.schedule()
            result = self._engine.forward(plan)
            sampled = {} if result is None else {sequence.request_id: int(result.logits[0].argmax())}
            self._scheduler.complete(plan, sampled)
        elapsed = time.perf_counter() - begin
        if sequence.cached_tokens != cached - cached % self.unit:
            raise RuntimeError(f"{sequence.cached_tokens} tokens were cached; this measurement needs {cached}")
        return elapsed


class Plain:
    """transformers alone."""

    def __init__(self, folder: Path, *, chunk: int) -> None:
        self._model = load_model(str(folder), attn_implementation="sdpa").model
        self._chunk = chunk

    @torch.inference_mode()
    def seconds(self, prompt: list[int]) -> float:
        begin = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        for start in range(0, len(prompt), self._chunk):
            chunk = torch.tensor([prompt[start : start + self._chunk]], device=self._model.device)
            scores = self._model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(scores[0, -1].argmax())
        return time.perf_counter() - begin


def smallest_sufficient(rates: Mapping[int, float], share: float) -> int:
    """The smallest chunk whose rate is at least ``share`` of the best one."""
    best = max(rates.values())
    return min(chunk for chunk, rate in rates.items() if rate >= share * best)


def by_chunk(folder: Path, prompts: Prompts, repeats: int) -> list[Row]:
    """Rates of SHORT tokens, each chunk size in turn."""
    engines = {chunk: Ours(folder, chunk=chunk, tokens=SHORT) for chunk in CHUNKS}
    for engine in engines.values():
        engine.seconds(prompts(SHORT))
    rates = {chunk: [SHORT / engines[chunk].seconds(prompts(SHORT))] for chunk in CHUNKS}
    for _ in range(repeats - 1):
        for chunk, engine in engines.items():
            rates[chunk].append(SHORT / engine.seconds(prompts(SHORT)))
    medians = {chunk: statistics.median(values) for chunk, values in rates.items()}
    best = max(CHUNKS, key=lambda chunk: medians[chunk])
    name = f"{folder.name}: smallest chunk with {SHARE_OF_BEST:.0%} of the best rate over {SHORT:,} tokens"
    return [
        *(
            Comparison(
                f"{folder.name}: rate over {SHORT:,} tokens, chunks of {chunk}", "tok/s",
                f"{chunk}", values, f"best, {best}", rates[best],
            )
            for chunk, values in rates.items()
        ),
        Figure(name, "tokens", [smallest_sufficient(medians, SHARE_OF_BEST)]),
    ]  # fmt: skip


def against_plain(folder: Path, prompts: Prompts, chunk: int, repeats: int) -> list[Row]:
    """Rates in the same chunks, taken in turn."""
    ours, theirs = Ours(folder, chunk=chunk, tokens=2 * LONG), Plain(folder, chunk=chunk)
    rows: list[Row] = []
    for length in (SHORT, LONG):
        rates: dict[Ours | Plain, list[float]] = {ours: [], theirs: []}
        for engine in rates:
            engine.seconds(prompts(length))
        for turn in range(repeats):
            for engine in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                rates[engine].append(length / engine.seconds(prompts(length)))
        name = f"{folder.name}: rate over {length:,} tokens, chunks of {chunk}"
        rows.append(
            Comparison(name, "tok/s", "ours", rates[ours], "transformers", rates[theirs], SHARE_OF_PLAIN, at_least=True)
        )
    return rows


def on_cached(engine: Ours, prompts: Prompts, rng: random.Random, alignments: int) -> float:
    """Mean seconds for TURN new tokens on about CONTEXT cached ones."""
    prefix = prompts(CONTEXT + SPAN)
    engine.seconds(prefix)
    times = []
    for _ in range(alignments):
        cached = CONTEXT - SPAN // 2 + rng.randrange(SPAN)
        times.append(engine.seconds(prefix[:cached] + prompts(TURN), cached=cached))
    return statistics.fmean(times)


def by_kernels(
    folder: Path, prompts: Prompts, rng: random.Random, chunk: int, repeats: int, alignments: int
) -> list[Row]:
    """Milliseconds of a cold prompt and of a turn on a cached one, with the C++ kernels and with torch, in turn."""
    engines = {
        name: Ours(folder, chunk=chunk, tokens=3 * CONTEXT, native=native)
        for name, native in (("kernels", True), ("torch", False))
    }
    cold: dict[str, list[float]] = {name: [] for name in engines}
    cached: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.seconds(prompts(SHORT))
    for _ in range(repeats):
        for name, engine in engines.items():
            cold[name].append(1e3 * engine.seconds(prompts(LONG)))
            cached[name].append(1e3 * on_cached(engine, prompts, rng, alignments))
    units = ", ".join(f"{name} {engine.unit}" for name, engine in engines.items())
    return [
        Comparison(f"{folder.name}: {what}", "ms", "kernels", times["kernels"], "torch", times["torch"])
        for what, times in (
            (f"{LONG:,} cold tokens", cold),
            (f"{TURN} new tokens on {CONTEXT:,} cached (unit of reuse: {units})", cached),
        )
    ]


def measure(folder: Path, rng: random.Random, *, chunk: int, repeats: int, alignments: int) -> list[Row]:
    vocabulary = range(AutoConfig.from_pretrained(folder).vocab_size)

    def prompts(length: int) -> list[int]:
        return rng.choices(vocabulary, k=length)

    return [
        *by_chunk(folder, prompts, repeats),
        *against_plain(folder, prompts, chunk, repeats),
        *by_kernels(folder, prompts, rng, chunk, repeats, alignments),
    ]


def default_models() -> list[Path]:
    return [
        ensure_model(arguments.WORK / "random-qwen2"),
        Path(str(files("emberkv"))) / "demo_model",
    ]


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--chunk", type=int, default=DEFAULT_PREFILL_CHUNK, help="for all but the rates by chunk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alignments", type=int, default=8, help="cached lengths tried in each round")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in ("chunk", "repeats", "alignments", "seed")}
    about = report.about("benchmarks.prefill", __doc__, **settings)
    rng = random.Random(given.seed)
    rows: list[Row] = []
    for folder in given.models or default_models():
        rows += measure(folder, rng, chunk=given.chunk, repeats=given.repeats, alignments=given.alignments)
    return report.publish(rows, about, given.out)


if __name__ == "__main__":
    sys.exit(main())
