"""Weights of 8 and 4 bits and KV of 8: perplexity of the demonstration model, and errors of random models' logits

    python -m benchmarks.quantised_quality [--tokens 1500] [--out PREFIX]

Both are computed as a server computes them, by the C++ kernels and through the KV pool. Perplexity is of the beginning
of the licence's text. The random models are small and differ in their seed; errors are relative to the logits of the
same weights in float32.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from benchmarks import arguments, report
from benchmarks.figures import Figure, Row
from benchmarks.random_qwen2 import write_model
from torch import Tensor

from emberkv.core.block_pool import BlockPool
from emberkv.core.hashing import TokenChain, root_hash
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.core.sequence import Sequence as Served
from emberkv.engine.torch.assembly import CacheSizes, ModelOptions, load_configured
from emberkv.engine.torch.engine import TorchEngine

BLOCK_SIZE, CHUNK = 16, 256
SEEDS = range(3)
TEXT = Path(__file__).parents[1] / "LICENSE"


class Format(NamedTuple):
    """How weights and activations are computed with, and KV is held."""

    dtype: Literal["float32", "bfloat16"]
    quantize: Literal["none", "int8", "int4"] = "none"
    kv_dtype: Literal["auto", "int8"] = "auto"

    @property
    def plain(self) -> bool:
        return self.quantize == "none" and self.kv_dtype == "auto"

    def __str__(self) -> str:
        weights = "" if self.quantize == "none" else f"{self.quantize} weights, "
        kv = "" if self.kv_dtype == "auto" else f", {self.kv_dtype} KV"
        return self.dtype if self.plain else f"{weights}{self.dtype} activations{kv}"


FORMATS = (
    Format("float32"),
    Format("bfloat16"),
    Format("bfloat16", "int8"),
    Format("bfloat16", "int4"),
    Format("bfloat16", kv_dtype="int8"),
)


def logits_of(model: Path, how: Format, prompt: Sequence[int] | str) -> tuple[Tensor, list[int]]:
    """fp32 ``[tokens, vocab]`` at each position of the prompt, and the prompt's tokens."""
    options = ModelOptions(
        model=str(model), dtype=how.dtype, quantize=how.quantize, kv_dtype=how.kv_dtype, kernels="native"
    )
    loaded, kernels = load_configured(options, CacheSizes(), lambda _: None)
    tokens = loaded.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else list(prompt)
    blocks = len(tokens) // BLOCK_SIZE + 2 * CHUNK // BLOCK_SIZE
    cache_bytes = blocks * BLOCK_SIZE * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    engine = TorchEngine(loaded, cache_bytes=cache_bytes, block_size=BLOCK_SIZE, prefill_chunk=CHUNK, kernels=kernels)
    cache = PrefixCache(BlockPool(engine.pool.num_blocks, BLOCK_SIZE), alignment=engine.alignment)
    scheduler = Scheduler(cache, SchedulerConfig(CHUNK, CHUNK))
    chain = TokenChain(root_hash(loaded.fingerprint, BLOCK_SIZE), tokens, BLOCK_SIZE)
    sequence = Served("quality", chain, max_new_tokens=1, wants_prompt_logits=True)
    scheduler.add(sequence)
    parts: list[Tensor] = []
    while sequence.finish_reason is None:
        plan = scheduler.schedule()
        result = engine.forward(plan)
        if result is not None:
            parts += [each.logits.float() for each in result.prompts]
        sampled = (
            {} if result is None or not result.sequences else {sequence.request_id: int(result.logits[0].argmax())}
        )
        scheduler.complete(plan, sampled)
    return torch.cat(parts), tokens


def perplexity(logits: Tensor, tokens: list[int]) -> float:
    following = torch.tensor(tokens[1:])
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, following[:, None])
    return math.exp(-float(logprobs.mean()))


def rows(tokens: int) -> list[Row]:
    demo, text = Path(str(files("emberkv") / "demo_model")), TEXT.read_text(encoding="utf-8")
    found: list[Row] = []
    plain = 0.0
    for how in FORMATS:
        logits, prompt = logits_of(demo, how, text[: tokens * 4])
        value = perplexity(logits, prompt)
        found.append(Figure(f"demo model, perplexity of {len(prompt):,} tokens: {how}", "", [value]))
        plain = value if how.plain else plain
        if not how.plain:
            found.append(Figure("the same, beside bfloat16's", "%", [100 * (value / plain - 1)]))
    prompt = [(7 * i * i + 3) % 1000 + 300 for i in range(tokens // 4)]  # of ids that have an embedding
    errors: dict[Format, list[float]] = {how: [] for how in FORMATS[1:]}
    same: dict[Format, list[float]] = {how: [] for how in FORMATS[1:]}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), hidden=256, intermediate=1024, layers=8, seed=seed)
            expected = logits_of(Path(name), FORMATS[0], prompt)[0]
            for how in FORMATS[1:]:
                got = logits_of(Path(name), how, prompt)[0]
                errors[how].append(100 * float(((got - expected).norm(dim=1) / expected.norm(dim=1)).mean()))
                same[how].append(100 * float((got.argmax(dim=1) == expected.argmax(dim=1)).float().mean()))
    for how in FORMATS[1:]:
        found.append(Figure(f"random models, relative error of logits: {how}", "%", errors[how]))
        found.append(Figure("the same, positions with the same best token", "%", same[how]))
    return found


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1500, help="of the text, about")
    given = parser.parse_args()
    about = report.about("benchmarks.quantised_quality", __doc__, tokens=given.tokens)
    return report.publish(rows(given.tokens), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
