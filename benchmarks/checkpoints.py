"""Hybrids: how many prompt tokens are computed, and in how many steps, by where checkpoints are left.

    python -m benchmarks.checkpoints [--seed 1]

Blocks of 64 tokens; a checkpoint saves at least 8. Twelve conversations at a time, in random order, with one sequence
in the pool at once: conversations behind four system prompts, such where one answer in five is asked for twice, or
one question in five is then asked in other words, such of a template that drops thoughts, such with a system prompt
each, single questions behind four system prompts, and agents of many turns behind two. Every prompt is computed in
the real scheduler over the real pool, without a model, so that the counts are the same on every machine. The last two
columns are means a request, in the order of the four columns before them.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence

BLOCK = 64
LEAST = 8
POOLS = (48, 96, 400)
AT_ONCE = 12
GENERATION_PROMPT = [1001, 1002, 1003]
"""Tokens of no text. Of a template that drops thoughts, the first alone stands before an earlier answer."""


@dataclass(frozen=True)
class Traffic:
    """systems: how many system prompts all conversations have; 0: each has its own. turns: the mean of questions.
    again: the share of prompts that come twice. drops_thoughts: from earlier answers. edits: the share of questions
    that are asked in other words once they are answered.
    """

    name: str
    conversations: int
    turns: float
    systems: int
    again: float = 0.0
    drops_thoughts: bool = False
    edits: float = 0.0


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    answer: list[int]
    hints: tuple[int, ...]


@dataclass
class Conversation:
    history: list[int]
    system_tokens: int
    questions_left: int


TRAFFIC = (
    Traffic("conversations", 40, 5, 4),
    Traffic("conversations, a fifth asked twice", 40, 5, 4, again=0.2),
    Traffic("conversations, a fifth edited", 40, 5, 4, edits=0.2),
    Traffic("conversations, thoughts dropped", 40, 5, 4, drops_thoughts=True),
    Traffic("conversations, own system prompts", 40, 5, 0),
    Traffic("single questions", 100, 0.1, 4),
    Traffic("agents", 15, 10, 2),
)
PLACES = ("nowhere within a prompt", "where prompts parted", "and at the end", "and at hints")


def requests(traffic: Traffic, rng: Random) -> Iterator[Asked]:
    """In the order in which they are asked."""

    def text(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randrange(shortest, longest))]

    systems = [text(50, 375) for _ in range(traffic.systems)]
    begun, open_now = 0, list[Conversation]()
    while begun < traffic.conversations or open_now:
        while len(open_now) < AT_ONCE and begun < traffic.conversations:
            system = rng.choice(systems) if systems else text(6, 190)
            open_now.append(Conversation([*system], len(system), int(rng.expovariate(1 / traffic.turns)) + 1))
            begun += 1
        one = rng.choice(open_now)
        asked = one.history + text(1, 50)
        prompt = asked + GENERATION_PROMPT
        kept = len(asked) + 1
        hints = (one.system_tokens, kept) if traffic.drops_thoughts else (one.system_tokens,)
        for _ in range(1 + (rng.random() < traffic.again)):
            thoughts = text(6, 75) if traffic.drops_thoughts else []
            said = text(1, 50)
            yield Asked(prompt, thoughts + said, hints)
        if rng.random() < traffic.edits:
            prompt = one.history + text(1, 50) + GENERATION_PROMPT
            yield Asked(prompt, said, hints)
        one.history = prompt[: kept if traffic.drops_thoughts else None] + said
        one.questions_left -= 1
        if not one.questions_left:
            open_now.remove(one)


@dataclass
class Counts:
    """Of one run: prompt tokens computed, steps until first tokens, and copies of blocks."""

    tokens: int = 0
    steps: int = 0
    copies: int = 0


def counted(asked: list[Asked], num_blocks: int, place: str) -> Counts:
    """Serves ``asked``, one after the other."""
    pool = BlockPool(num_blocks, BLOCK)
    least = sys.maxsize if place == PLACES[0] else LEAST
    cache = PrefixCache(pool, alignment=BLOCK, batch_invariant=True, within_blocks=False, branch_tokens=least)
    scheduler = Scheduler(cache, SchedulerConfig(BLOCK, 4 * BLOCK))
    root = root_hash("checkpoints", BLOCK)
    counts = Counts()
    for number, each in enumerate(asked):
        end = len(each.prompt) - 1
        wanted = {PLACES[2]: (end,), PLACES[3]: (*each.hints, end)}.get(place, ())
        chain = TokenChain(root, each.prompt, BLOCK)
        sequence = Sequence(str(number), chain, len(each.answer) + 1, checkpoints=wanted)
        scheduler.add(sequence)
        answer = iter([*each.answer, 0])
        while sequence.finish_reason is None:
            plan = scheduler.schedule()
            samples = bool(plan.decodes) or any(chunk.samples for chunk in plan.prefills)
            counts.steps += bool(plan.prefills)
            counts.copies += sum(chunk.copy is not None for chunk in plan.prefills)
            scheduler.complete(plan, {sequence.request_id: next(answer)} if samples else {})
    counts.tokens = pool.stats.prefill_tokens
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args(argv).seed
    print(f"| traffic | blocks | prompt tokens computed: {PLACES[0]} | {' | '.join(PLACES[1:])} ", end="")
    print("| steps until the first token | copies a request |")
    print("|---|---:|---:|---:|---:|---:|---|---|")
    for traffic in TRAFFIC:
        asked = list(requests(traffic, Random(seed)))
        total = sum(len(each.prompt) for each in asked)
        for num_blocks in POOLS:
            counts = [counted(asked, num_blocks, place) for place in PLACES]
            rest = [f"{each.tokens / counts[0].tokens:.2f}" for each in counts[1:]]
            rest.append(", ".join(f"{each.steps / len(asked):.2f}" for each in counts))
            rest.append(", ".join(f"{each.copies / len(asked):.2f}" for each in counts))
            first = f"{counts[0].tokens / total:.1%}"
            print(f"| {traffic.name} | {num_blocks} | {first} | {' | '.join(rest)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
