"""Each further architecture: hits against cold runs bit by bit, and logits against transformers' own."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emberkv.engine.torch.model.attention_interface import own_implementation
from emberkv.engine.torch.native.kernels import Kernels
from tests import architecture_table
from tests.conftest import CheckpointFactory
from tests.engine.conftest import DriverFactory, ModelFactory
from tests.engine.driver import BLOCK, CHUNK, Driver
from tests.models import ALSO_SUPPORTED, BY_BLOCKS, BY_CHUNKS, VOCAB_SIZE

COMBINATIONS = [(arch, dtype) for arch in sorted(ALSO_SUPPORTED) for dtype in ("float32", "bfloat16")]
COMBINATIONS += [(arch, "bfloat16/int8") for arch in ("gpt_oss", "llama4_text", "deepseek_v3")]


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize(("arch", "dtype"), COMBINATIONS)
def test_with_the_kernels_a_hit_ends_where_it_should_and_changes_no_bit(
    paged: ModelFactory, kernels: Kernels, arch: str, dtype: str
) -> None:
    """In the middle of a prompt, in what decode steps have computed, and among other sequences of the same step."""
    rng = random.Random(f"{arch} {dtype}")
    warm = Driver(paged(arch, dtype), kernels=kernels, max_step_tokens=24)
    cold = Driver(paged(arch, dtype), kernels=kernels, prefix_cache=False)
    assert warm.executor.batch_invariant is (arch not in BY_CHUNKS)
    assert warm.cache.hit_unit == (CHUNK if arch in BY_CHUNKS else BLOCK if arch in BY_BLOCKS else 1)
    stem = text(rng, 2 * CHUNK + 3)
    stem += warm.run_one(stem, new=30).tokens[:-1]
    kept = [2 * CHUNK + 25, CHUNK + 5, CHUNK - 1, BLOCK + 2]
    prompts = [[*stem[:keep], (stem[keep] - 2) % (VOCAB_SIZE - 3) + 3, *text(rng, keep % 19)] for keep in kept]
    for run, keep, prompt in zip(warm.run(*prompts, new=4), kept, prompts, strict=True):
        alone = cold.run_one(prompt, new=4)
        assert run.cached == keep // warm.cache.hit_unit * warm.cache.hit_unit
        assert torch.equal(run.logits[0], alone.logits[0])
        if warm.executor.batch_invariant:
            assert all(map(torch.equal, run.logits, alone.logits))
    assert warm.mixed_steps > 0


@pytest.mark.parametrize("arch", sorted(ALSO_SUPPORTED))
def test_logits_are_those_of_transformers(
    driver: DriverFactory, paged: ModelFactory, checkpoint: CheckpointFactory, arch: str
) -> None:
    """Of a prompt longer than windows and chunks, half of which is cached, and of what follows it."""
    prompt = text(random.Random(arch), 150)
    ours = driver(paged(arch))
    ours.run_one(prompt[:100])
    run = ours.run_one(prompt, new=8)
    implementation = own_implementation(AutoConfig.from_pretrained(checkpoint(arch)))
    auto_class: Any = AutoModelForCausalLM
    plain = auto_class.from_pretrained(checkpoint(arch), attn_implementation=implementation, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.tensor([prompt + run.tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert run.cached >= CHUNK
    torch.testing.assert_close(torch.stack(run.logits), expected, rtol=2e-4, atol=2e-4)


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    assert architecture_table.DOCUMENT.read_text() == architecture_table.document(), (
        "python -m tests.architecture_table"
    )
