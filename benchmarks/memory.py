"""Resident memory of a server whose pool is full: what explains it, and whether it grows.

    python -m benchmarks.memory [--emberkv "COMMAND"] [--model FOLDER] [--quantize int8] [--cache-ram 1GiB]
        [--out PREFIX]

The constant is measured, not fitted: a server of the same vocabulary, tokenizer and heads, but of one narrow layer and
a 1 MiB pool, is started and asked a part of the same requests; what it keeps resident beyond its own weights and pool
is the constant. It consists of the interpreter and the imported libraries, the tokenizer, the HTTP server, threads, and
buffers that depend on the longest prompt rather than on the model. Exits with 1 when a target is missed.
"""

import asyncio
import math
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from benchmarks import arguments, lib, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.random_qwen2 import ensure_model, write_model
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ByteSize, TypeAdapter

from emberkv.cli.bench import connect
from emberkv.engine.torch.model.description import describe_model
from emberkv.engine.torch.model.inspection import inspect_model
from emberkv.engine.torch.model.loader import open_source
from emberkv.engine.torch.quantization.weight import DEFAULT_GROUP

LONG = 2000  # tokens of the prompts that fill the pool
SHORT = (32, 256)  # tokens of the prompts after that, from and to
ANSWER = 8
CONCURRENCY = 8
BATCH = 200
TINY_POOL = "1MiB"
MAX_DEVIATION, MAX_GROWTH = 5.0, 1.0  # percent
MIB = 2**20


@dataclass(slots=True)
class Residence:
    """Bytes resident in a server, by stage of its life. after: by how many short requests it has answered."""

    loaded: int
    filled: int = 0
    after: dict[int, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return self.after[max(self.after)]

    def growth(self, start: int) -> int:
        """Bytes from request ``start`` to the last."""
        return self.last - self.after[start]


def resident(pid: int) -> int:
    """Bytes of the process and all it has started."""
    process = psutil.Process(pid)
    return sum(int(each.memory_info().rss) for each in (process, *process.children(recursive=True)))


async def evictions(client: httpx.AsyncClient) -> float:
    """Blocks evicted so far; above 0 means that every block has been written."""
    response = await client.get("/metrics")
    samples = (sample for family in text_string_to_metric_families(response.text) for sample in family.samples)
    return next(sample.value for sample in samples if sample.name == "emberkv_evicted_blocks_total")


async def ask_all(prompter: lib.Prompter, lengths: list[int], max_tokens: int) -> None:
    """New prompts of these lengths, CONCURRENCY at a time."""
    left = iter(lengths)

    async def client() -> None:
        for length in left:
            await prompter.ask(prompter.fresh(length), max_tokens=max_tokens)

    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))


async def observe(running: lib.Running, rng: random.Random, requests: int) -> Residence:
    """Fills the pool with long prompts and then asks short ones; all are new."""
    seen = Residence(resident(running.pid))
    async with connect(running.url, None, timeout=600) as client:
        prompter = await lib.Prompter.connect(client, rng)
        await ask_all(prompter, [LONG] * CONCURRENCY, 1)
        while not await evictions(client):
            await ask_all(prompter, [LONG] * CONCURRENCY, 1)
        seen.filled = resident(running.pid)
        for done in range(BATCH, requests + 1, BATCH):
            await ask_all(prompter, [rng.randint(*SHORT) for _ in range(BATCH)], ANSWER)
            seen.after[done] = resident(running.pid)
    return seen


def serve_and_observe(server: lib.Server, log: Path, rng: random.Random, requests: int) -> Residence:
    with lib.running(server, log) as running:
        return asyncio.run(observe(running, rng, requests))


def size_of(text: str) -> int:
    """Bytes of "1GiB" and the like."""
    return int(TypeAdapter(ByteSize).validate_python(text))


def weights(folder: Path, quantize: str | None) -> int:
    """Bytes of a model's weights as they are served, as `emberkv models` gives them."""
    found = describe_model(str(folder), device="cpu")
    size = found.quantised_bytes.get(quantize) if quantize else found.weight_bytes
    if size is None:
        raise ValueError(f"nothing says how large {folder} is with --quantize {quantize}")
    return size


def rows(seen: Residence, weights: int, pool: int, constant: int) -> list[Row]:
    """What is resident, what explains it, and how far they differ. All in bytes."""
    expected = weights + pool + constant
    deviation = 100 * abs(seen.last - expected) / expected
    growth = seen.growth(BATCH)
    last = max(seen.after)
    return [
        Figure("weights", "MiB", [weights / MIB]),
        Figure("pool", "MiB", [pool / MIB]),
        Figure("constant", "MiB", [constant / MIB]),
        Figure("resident once loaded, the pool not yet written", "MiB", [seen.loaded / MIB]),
        Figure("resident once the pool is full", "MiB", [seen.filled / MIB]),
        Comparison(
            f"resident after {last:,} more requests",
            "MiB",
            "resident",
            [seen.last / MIB],
            "explained",
            [expected / MIB],
        ),
        Figure("the difference of the two", "%", [deviation], MAX_DEVIATION),
        Figure(f"growth from request {BATCH:,} to {last:,}", "MiB", [growth / MIB]),
        Figure("the same, of what is resident", "%", [100 * growth / seen.last], MAX_GROWTH),
    ]


def tiny_model(model: Path, work: Path) -> Path:
    """A model with the vocabulary, the tokenizer and the number of heads of ``model``, of one narrow layer."""
    geometry = inspect_model(open_source(model).config).geometry
    heads = geometry.num_heads
    folder = work / f"tiny-qwen2-{geometry.vocab_size}-{heads}-{geometry.num_kv_heads}"
    if not (folder / "config.json").exists():
        write_model(
            folder, hidden=math.lcm(8 * heads, DEFAULT_GROUP), heads=heads, kv_heads=geometry.num_kv_heads,
            intermediate=64, layers=1, vocab=geometry.vocab_size,
        )  # fmt: skip
    for path in model.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def main() -> int:
    parser = arguments.random_model_parser(__doc__, cache_ram="1GiB")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="serve the weights so, in the tiny model, too")
    parser.add_argument("--requests", type=int, default=1000, help=f"a multiple of {BATCH}, above it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    arguments.WORK.mkdir(parents=True, exist_ok=True)
    settings = {
        "cache_ram": given.cache_ram, "requests": given.requests, "seed": given.seed,
        **({"quantize": given.quantize} if given.quantize else {}),
    }  # fmt: skip
    about = report.about("benchmarks.memory", __doc__, **settings)
    rng, log = random.Random(given.seed), arguments.WORK / "emberkv.log"
    model = ensure_model(given.model)
    tiny = tiny_model(model, arguments.WORK)
    flags = ("--quantize", given.quantize) if given.quantize else ()
    bare = serve_and_observe(lib.emberkv_server(given.emberkv, tiny, "--cache-ram", TINY_POOL, *flags), log, rng, BATCH)
    constant = bare.last - weights(tiny, given.quantize) - size_of(TINY_POOL)
    full = lib.emberkv_server(given.emberkv, model, "--cache-ram", given.cache_ram, *flags)
    seen = serve_and_observe(full, log, rng, given.requests)
    found = rows(seen, weights(model, given.quantize), size_of(given.cache_ram), constant)
    return report.publish(found, about, given.out)


if __name__ == "__main__":
    sys.exit(main())
