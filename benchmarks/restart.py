"""The first long prompt after a restart, its state read from the disk tier: against a hit in the pool and against cold.

    python -m benchmarks.restart [--emberkv "COMMAND"] [--model FOLDER] [--rounds 3] [--out PREFIX]

Each round computes prompts of 8,000 tokens, asks each again, stops the server, and starts it twice on the same folder:
once with the files as the system has cached them, once after they were dropped from its cache. Only the first long
prompt of each start is measured. Exits with 1 when a target is missed.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import arguments, lib, report
from benchmarks.figures import Comparison
from benchmarks.random_qwen2 import ensure_model

from emberkv.cli.bench import connect

CONTEXT, TURN = 8000, 32
Figures = dict[str, float]


async def before(url: str, rng: random.Random, samples: int) -> tuple[Figures, list[str]]:
    """Median seconds to the first token, cold and of a turn on what the pool has; and the prompts, now on disk."""
    times: dict[str, list[float]] = {"cold": [], "pool": []}
    async with connect(url, None, timeout=600) as client:
        prompter = await lib.Prompter.connect(client, rng)
        await prompter.ask(prompter.fresh(CONTEXT), max_tokens=8)
        prefixes = [prompter.fresh(CONTEXT) for _ in range(samples)]
        for prefix in prefixes:
            times["cold"].append(await prompter.ttft(prefix, cached=False))
            times["pool"].append(await prompter.ttft(prefix + prompter.fresh(TURN), cached=True))
    return {kind: statistics.median(values) for kind, values in times.items()}, prefixes


async def after(url: str, rng: random.Random, prefix: str) -> float:
    """Seconds to the first token of a turn on ``prefix``, in a server that has just been started."""
    async with connect(url, None, timeout=600) as client:
        prompter = await lib.Prompter.connect(client, rng)
        return await prompter.ttft(prefix + prompter.fresh(TURN), cached=True)


def forget_files(folder: Path) -> None:
    """Have the system drop what it has cached of the files in ``folder``, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(server: lib.Server, folder: Path, log: Path, samples: int) -> Figures:
    rng = random.Random(os.urandom(16))
    with lib.serving(server, log) as url:
        figures, prefixes = asyncio.run(before(url, rng, samples))
    with lib.serving(server, log) as url:
        figures["disk, in the page cache"] = asyncio.run(after(url, rng, prefixes[0]))
    forget_files(folder)
    with lib.serving(server, log) as url:
        figures["disk, read anew"] = asyncio.run(after(url, rng, prefixes[-1]))
    return figures


def table(rounds: Sequence[Figures]) -> list[Comparison]:
    rows = []
    for disk in ("disk, in the page cache", "disk, read anew"):
        for other, target in (("pool", 3.0), ("cold", 1 / 8)):
            tops, bottoms = ([figures[side] for figures in rounds] for side in (disk, other))
            name = f"first TTFT on 8,000 tokens after a restart ({disk.removeprefix('disk, ')})"
            rows.append(Comparison(name, "s", "disk", tops, other, bottoms, target))
    return rows


def main() -> int:
    parser = arguments.random_model_parser(__doc__, cache_ram="2GiB", rounds=3)
    parser.add_argument("--samples", type=int, default=3, help="prompts computed in each round")
    given = parser.parse_args()
    arguments.WORK.mkdir(parents=True, exist_ok=True)
    settings = {"rounds": given.rounds, "samples": given.samples, "cache_ram": given.cache_ram}
    about = report.about("benchmarks.restart", __doc__, **settings)
    rounds = []
    ensure_model(given.model)
    for turn in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.WORK) as folder:
            flags = ("--cache-ram", given.cache_ram, "--dtype", "bfloat16", "--cache-dir", folder)
            server = lib.emberkv_server(given.emberkv, given.model, *flags)
            rounds.append(one_round(server, Path(folder), arguments.WORK / "emberkv.log", given.samples))
        print(f"round {turn + 1}: {rounds[-1]}", file=sys.stderr)
    return report.publish(table(rounds), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
