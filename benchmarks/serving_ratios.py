"""emberkv against itself: what a hit saves, what the cache costs, and what streams gain from sharing steps.

    python -m benchmarks.serving_ratios [--emberkv "COMMAND"] [--model FOLDER] [--rounds 3] [--out PREFIX]

All figures are ratios of measurements of the same round, so that they mean the same on other machines. Exits with 1
when a target is missed.
"""

import asyncio
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import arguments, lib, report
from benchmarks.figures import Comparison
from benchmarks.random_qwen2 import ensure_model

from emberkv.bench.client import TimedAnswer
from emberkv.cli.bench import connect

CONTEXT, TURN = 8000, 32
SPAN = 512  # cached lengths are drawn from CONTEXT +- SPAN / 2, so that every way to fall on a chunk occurs
STREAMS = 16
ANSWER = 128
Figures = dict[str, float]


async def hits(prompter: lib.Prompter, rng: random.Random, alignments: int) -> Figures:
    """Mean seconds to the first token: of long prompts, of a turn on each of them, and of a turn's length alone."""
    times: dict[str, list[float]] = {"cold": [], "cached": [], "short": []}
    for _ in range(alignments):
        prefix = prompter.fresh(CONTEXT - SPAN // 2 + rng.randrange(SPAN))
        times["cold"].append(await prompter.ttft(prefix, cached=False))
        times["cached"].append(await prompter.ttft(prefix + prompter.fresh(TURN), cached=True))
        times["short"].append(await prompter.ttft(prompter.fresh(TURN), cached=False))
    return {kind: statistics.fmean(values) for kind, values in times.items()}


async def cold(prompters: Sequence[lib.Prompter], samples: int) -> list[float]:
    """Each server's median seconds to the first token of fresh prompts, servers taken in turn."""
    times: list[list[float]] = [[] for _ in prompters]
    for sample in range(samples):
        order = list(zip(prompters, times, strict=True))
        for prompter, seen in order if sample % 2 == 0 else reversed(order):
            seen.append(await prompter.ttft(prompter.fresh(CONTEXT + TURN), cached=False))
    return [statistics.median(seen) for seen in times]


def steady_rate(answers: Sequence[TimedAnswer]) -> float:
    """Tokens a second while all streams decode: from the last one's first text to the first one's last text."""
    start = max(answer.piece_times[0] for answer in answers)
    end = min(answer.piece_times[-1] for answer in answers)
    if end <= start:
        raise RuntimeError("the streams never ran at the same time; answers must be longer")
    tokens = sum(
        sum(start < at <= end for at in answer.piece_times) * answer.output_tokens / len(answer.piece_times)
        for answer in answers
    )
    return tokens / (end - start)


def whole_rate(answers: Sequence[TimedAnswer]) -> float:
    """Tokens a second from the first request sent to the last answer's end."""
    time = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    return sum(answer.output_tokens for answer in answers) / time


async def decode(prompter: lib.Prompter, streams: int, *, own: int, shared: str) -> Sequence[TimedAnswer]:
    """Answers of ANSWER tokens, all asked at once, to prompts of ``shared`` and ``own`` more tokens, cached before."""
    prompts = [shared + prompter.fresh(own) for _ in range(streams)]
    for prompt in prompts:
        await prompter.ask(prompt)
    return await asyncio.gather(*(prompter.ask(prompt, max_tokens=ANSWER) for prompt in prompts))


async def rates(prompter: lib.Prompter) -> Figures:
    """Tokens a second of one stream and of STREAMS, after short and after long, mostly shared prompts."""
    figures: Figures = {}
    for context, shared, own in (("500", "", 500), ("2,500", prompter.fresh(2000), 500)):
        for streams in (1, STREAMS):
            answers = await decode(prompter, streams, own=own, shared=shared)
            figures[f"{streams} at {context}"] = steady_rate(answers)
            figures[f"{streams} at {context}, whole"] = whole_rate(answers)
    return figures


async def measure(on: str, off: str, rng: random.Random, alignments: int) -> Figures:
    """One round. on, off: URLs of a server with and of one without the prefix cache."""
    async with connect(on, None, timeout=600) as cached, connect(off, None, timeout=600) as uncached:
        prompters = [await lib.Prompter.connect(client, rng) for client in (cached, uncached)]
        for prompter in prompters:
            await prompter.ask(prompter.fresh(CONTEXT + TURN), max_tokens=8)
        times = await cold(prompters, alignments)
        figures = dict(zip(("cold, cache on", "cold, cache off"), times, strict=True))
        return figures | await hits(prompters[0], rng, alignments) | await rates(prompters[0])


def one_round(on: lib.Server, off: lib.Server, log: Path, alignments: int) -> Figures:
    """Both servers run at once, so that they can be asked in turn; the idle one takes no time from the other."""
    rng = random.Random(os.urandom(16))
    with lib.serving(on, log) as with_cache, lib.serving(off, log) as without_cache:
        return asyncio.run(measure(with_cache, without_cache, rng, alignments))


def table(rounds: Sequence[Figures]) -> list[Comparison]:
    def row(name: str, unit: str, top: str, bottom: str, target: float | None, *, at_least: bool = False) -> Comparison:
        tops, bottoms = ([figures[side] for figures in rounds] for side in (top, bottom))
        return Comparison(name, unit, top, tops, bottom, bottoms, target, at_least)

    rows = [
        row("TTFT of a 32-token turn on 8,000 cached tokens, against cold", "s", "cached", "cold", 1 / 20),
        row("the same, against a 32-token prompt alone", "s", "cached", "short", 2.0),
        row("cold TTFT of 8,032 tokens", "s", "cold, cache on", "cold, cache off", 1.03),
    ]
    contexts = (("500", "at 500 tokens", 5.0), ("2,500", "at 2,500 tokens, 2,000 of them shared", 4.0))
    for context, words, target in contexts:
        one, many = f"1 at {context}", f"{STREAMS} at {context}"
        rows += [
            row(f"{STREAMS} streams against one {words}", "tok/s", many, one, target, at_least=True),
            row("the same, first request to last answer", "tok/s", f"{many}, whole", f"{one}, whole", None),
        ]
    return rows


def main() -> int:
    parser = arguments.random_model_parser(__doc__, cache_ram="2GiB", rounds=3)
    parser.add_argument("--alignments", type=int, default=24, help="cached lengths tried in each round")
    given = parser.parse_args()
    arguments.WORK.mkdir(parents=True, exist_ok=True)
    flags = ("--cache-ram", given.cache_ram, "--dtype", "bfloat16")
    on = lib.emberkv_server(given.emberkv, ensure_model(given.model), *flags)
    off = lib.emberkv_server(given.emberkv, given.model, *flags, "--no-prefix-cache")
    settings = {"rounds": given.rounds, "alignments": given.alignments, "cache_ram": given.cache_ram}
    about = report.about("benchmarks.serving_ratios", __doc__, **settings)
    rounds = []
    for turn in range(given.rounds):
        rounds.append(one_round(on, off, arguments.WORK / "emberkv.log", given.alignments))
        print(f"round {turn + 1}: {rounds[-1]}", file=sys.stderr)
    return report.publish(table(rounds), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
