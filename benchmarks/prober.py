"""What response times reveal of another tenant's prompts: times to the first token, warm elsewhere and fresh.

    python -m benchmarks.prober [--emberkv "COMMAND"] [--samples 100] [--tokens 400] [--rounds 3] [--out PREFIX]

A victim warms prompts with its own key. A prober asks for these, for as many that no tenant has asked for, and, as a
check of the timing, for as many of its own that are warm, in random order. The AUC is the probability that a fresh
prompt took longer than the other; a guess is 0.5. Serves the bundled model. Exits with 1 when a target is missed.
"""

import asyncio
import random
import sys
import tempfile
from pathlib import Path

from benchmarks import arguments, lib, report
from benchmarks.figures import Figure
from benchmarks.rank_test import auc, p_value

from emberkv.cli.bench import connect

KEYS = ("victim-key", "prober-key")
DISTANCE = 0.1
"""Of an AUC from 0.5: 2.4 standard deviations of two alike samples of 100."""

KINDS = ("victim's", "own", "fresh")


async def one_round(url: str, rng: random.Random, samples: int, tokens: int) -> dict[str, list[float]]:
    """Seconds to the first token, of each kind of prompt that the prober asks for."""
    async with connect(url, KEYS[0], timeout=600) as victim, connect(url, KEYS[1], timeout=600) as prober:
        first, second = await lib.Prompter.connect(victim, rng), await lib.Prompter.connect(prober, rng)
        prompts = {kind: [second.fresh(tokens) for _ in range(samples)] for kind in KINDS}
        for prompt in prompts["victim's"]:
            await first.ask(prompt)
        for prompt in prompts["own"]:
            await second.ask(prompt)
        order = [(kind, prompt) for kind in KINDS for prompt in prompts[kind]]
        rng.shuffle(order)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for kind, prompt in order:
            seconds[kind].append(await second.ttft(prompt, cached=kind == "own"))
    return seconds


def table(rounds: list[dict[str, list[float]]], rng: random.Random) -> list[Figure]:
    others = [auc(each["victim's"], each["fresh"]) for each in rounds]
    own = [auc(each["own"], each["fresh"]) for each in rounds]
    chances = [p_value(each["victim's"], each["fresh"], rng) for each in rounds]
    return [
        Figure("AUC, another tenant's warm prompts against fresh ones", "", others),
        Figure("its distance from a guess", "", [abs(each - 0.5) for each in others], DISTANCE),
        Figure("how often chance is as far from a guess", "", chances),
        Figure("AUC, own warm prompts against fresh ones", "", own, 0.9, at_least=True),
    ]


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=3)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=400)
    given = parser.parse_args()
    settings = {"samples": given.samples, "tokens": given.tokens, "rounds": given.rounds}
    keys = [flag for key in KEYS for flag in ("--api-key", key)]
    server = lib.Server(
        "emberkv",
        lambda port: [*given.emberkv, "serve", "--port", str(port), "--cache-ram", "1GiB", "--no-warmup", *keys],
        "/ready",
    )
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, lib.serving(server, Path(folder) / "emberkv.log") as url:
        rounds = [asyncio.run(one_round(url, rng, given.samples, given.tokens)) for _ in range(given.rounds)]
    return report.publish(table(rounds, rng), report.about("benchmarks.prober", __doc__, **settings), given.out)


if __name__ == "__main__":
    sys.exit(main())
