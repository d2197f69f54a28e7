"""Token masks of constrained answers over a vocabulary of 150,000 tokens, and what they cost a step.

    python -m benchmarks.constrained [--vocab 150000] [--rounds 5] [--tokens 200] [--out PREFIX]

Answers are drawn at random among the allowed tokens, by the sampler that serves. Exits with 1 when a target is missed.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from benchmarks import arguments, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.random_qwen2 import END, vocabulary
from transformers import Qwen2Tokenizer

from emberkv.engine.constraints import ConstraintCompiler, advance
from emberkv.engine.executor import SampledToken, SamplingState
from emberkv.engine.request import Constraint, SamplingParams
from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer
from emberkv.engine.torch.sampling import Sampler

TARGET_US = 100.0
_TOOL = {
    "type": "object",
    "properties": {
        "file_path": {"type": "string"},
        "old_string": {"type": "string"},
        "new_string": {"type": "string"},
        "replace_all": {"type": "boolean"},
        "lines": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["file_path", "old_string", "new_string"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "JSON schema": Constraint("json_schema", json.dumps(_TOOL)),
    "any JSON objects": Constraint("json_schema", '{"type": "array", "items": {"type": "object"}, "minItems": 50}'),
    "regular expression": Constraint("regex", r"([a-z]+ [0-9]{1,3}\n){20,}"),
}


class Bench:
    """A compiler for a made-up vocabulary of ``vocab`` tokens, and the sampler that serves."""

    def __init__(self, vocab: int) -> None:
        pieces, merges = vocabulary(vocab, random.Random(1))
        tokenizer = HFTokenizer(Qwen2Tokenizer(vocab=pieces, merges=merges, unk_token=END, eos_token=END))
        self.compiler = ConstraintCompiler(tokenizer, vocab_size=vocab, eos_token_ids=frozenset({pieces[END]}))
        self.sampler = Sampler()
        self.logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(1))

    def compile_ms(self, constraint: Constraint) -> float:
        """From the request to the first mask."""
        begin = time.perf_counter()
        self.compiler.begin(constraint).allowed()
        return 1e3 * (time.perf_counter() - begin)

    def answer(self, constraint: Constraint | None, tokens: int, seed: int) -> tuple[list[int], list[float]]:
        """An answer of at most ``tokens``, and the sampler's time for each in microseconds, masks being ready."""
        masks = self.compiler.begin(constraint) if constraint is not None else None
        params = SamplingParams(temperature=1.0, seed=seed)
        state, taken = SamplingState(params, [0], random.Random(seed), masks=masks), list[float]()
        for number in range(tokens):
            if masks is not None:
                masks.allowed()  # waits for it: in a server, the model computes meanwhile
            begin = time.perf_counter()
            (sampled,) = self.sampler.sample(self.logits[number % 8 : number % 8 + 1], [state])
            taken.append(1e6 * (time.perf_counter() - begin))
            assert isinstance(sampled, SampledToken), sampled
            if state.ends_with(sampled.token_id):
                break
            state.append(sampled.token_id)
        return state.answer, taken

    def masks_us(self, constraint: Constraint, answer: Sequence[int]) -> list[float]:
        """How long the mask behind each token of an answer takes, in microseconds, in a matcher of its own."""
        matcher, taken = self.compiler.matcher(constraint), list[float]()
        for token in answer:
            begin = time.perf_counter()
            advance(matcher, (token,))
            taken.append(1e6 * (time.perf_counter() - begin))
        return taken


def measure(bench: Bench, rounds: int, tokens: int) -> list[Row]:
    """Of each constraint: its compilation, its masks, and what it adds to a step's sampling."""
    bench.compile_ms(Constraint("regex", "a"))  # reads the tokenizer
    free = [statistics.median(bench.answer(None, tokens, seed)[1]) for seed in range(rounds)]
    made: list[Row] = []
    for name, constraint in CONSTRAINTS.items():
        compiled = bench.compile_ms(constraint)
        answers = [bench.answer(constraint, tokens, seed) for seed in range(rounds)]
        masks = [bench.masks_us(constraint, answer) for answer, _ in answers]
        made += [
            Figure(f"{name}, to the first mask", "ms", [compiled]),
            Figure(f"{name}, a mask, median", "us", [statistics.median(each) for each in masks], TARGET_US),
            Figure(f"{name}, a mask, 99th percentile", "us", [statistics.quantiles(each, n=100)[98] for each in masks]),
            Comparison(
                f"{name}, sampling a token", "us",
                "constrained", [statistics.median(taken) for _, taken in answers], "free", free,
            ),
        ]  # fmt: skip
    return made


def main() -> int:
    parser = arguments.parser(__doc__, rounds=5)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    about = report.about("benchmarks.constrained", __doc__, vocab=given.vocab, rounds=given.rounds, tokens=given.tokens)
    return report.publish(measure(Bench(given.vocab), given.rounds, given.tokens), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
