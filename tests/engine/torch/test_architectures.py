"""Each further architecture: hits against cold runs bit by bit, and logits against transformers' own."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.attention_interface import own_implementation
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.native.kernels import Kernels
from tests import architecture_table
from tests.architectures import ALSO_SUPPORTED, BY_BLOCKS, BY_CHUNKS
from tests.conftest import CheckpointFactory
from tests.engine.conftest import ModelFactory
from tests.engine.driver import BLOCK, CHUNK, Driver
from tests.models import VOCAB_SIZE

FLOAT32 = [(arch, "float32") for arch in sorted(ALSO_SUPPORTED)]
COMBINATIONS = [(arch, dtype) for arch, _ in FLOAT32 for dtype in ("float32", "bfloat16")]
COMBINATIONS += [(arch, "bfloat16/int8") for arch in ("gpt_oss", "gemma4_text", "llama4_text", "deepseek_v3")]
OF_EACH_KIND = (
    "bamba", "bloom", "deepseek_v2", "deepseek_v3", "falcon", "falcon-alibi", "falcon_h1", "gemma3n_text",
    "gemma4_text", "gpt_neo", "gpt_oss", "granitemoehybrid", "lfm2", "llama4_text", "mimo_v2_flash", "mpt",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "vaultgemma", "xglm",
)  # fmt: skip
"""Of each way to attend and of each kind of state, some: without the kernels, all else is the model's own code."""


@dataclass(frozen=True)
class Served:
    """An engine with the kernels, which is what a test of an architecture spends most of its time on."""

    arch: str
    loaded: LoadedModel
    executor: TorchEngine
    kernels: Kernels

    def warm(self) -> Driver:
        """A driver of the engine, which has cached nothing yet. What another one has cached is overwritten."""
        return Driver(self.loaded, kernels=self.kernels, max_step_tokens=24, executor=self.executor)

    def cold(self) -> Driver:
        """The same without a cache."""
        return Driver(self.loaded, kernels=self.kernels, prefix_cache=False, executor=self.executor)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, paged: ModelFactory, kernels: Kernels) -> Served:
    """Of an architecture and type, for all tests of it, which run one after the other.

    An architecture's types follow one another, as they do in the first test's parameters. So what a config describes is
    inspected once.
    """
    arch, dtype = request.param
    loaded = paged(arch, dtype)
    return Served(arch, loaded, Driver(loaded, kernels=kernels).executor, kernels)


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


OwnLogits = Callable[[str, list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def own_logits(checkpoint: CheckpointFactory) -> OwnLogits:
    """``own_logits(arch, tokens)``, ``[tokens, vocab]``: what transformers computes without any of ours."""
    auto_class: Any = AutoModelForCausalLM

    @cache
    def plain(arch: str) -> Any:
        implementation = own_implementation(AutoConfig.from_pretrained(checkpoint(arch)))
        return auto_class.from_pretrained(checkpoint(arch), attn_implementation=implementation, dtype=torch.float32)

    def get(arch: str, tokens: list[int]) -> torch.Tensor:
        model = plain(arch)
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
        return logits

    return get


def assert_logits_are_transformers(own_logits: OwnLogits, arch: str, driver: Driver) -> None:
    """Of a prompt longer than windows and chunks, half of which is cached, and of what follows it."""
    prompt = text(random.Random(arch), 150)
    driver.run_one(prompt[:100])
    run = driver.run_one(prompt, new=4)
    expected = own_logits(arch, prompt + run.tokens[:-1])[len(prompt) - 1 :]
    assert run.cached >= CHUNK
    torch.testing.assert_close(torch.stack(run.logits), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("served", COMBINATIONS, indirect=True, ids="-".join)
def test_with_the_kernels_a_hit_ends_where_it_should_and_changes_no_bit(served: Served) -> None:
    """In the middle of a prompt, in what decode steps have computed, and among other sequences of the same step."""
    rng, warm, arch = random.Random(served.arch), served.warm(), served.arch
    assert warm.executor.batch_invariant is (arch not in BY_CHUNKS)
    assert warm.cache.hit_unit == (CHUNK if arch in BY_CHUNKS else BLOCK if arch in BY_BLOCKS else 1)
    stem = text(rng, 2 * CHUNK + 3)
    stem += warm.run_one(stem, new=8).tokens[:-1]
    kept = [2 * CHUNK + 9, CHUNK + 5, CHUNK - 1, BLOCK + 2]
    prompts = [[*stem[:keep], (stem[keep] - 2) % (VOCAB_SIZE - 3) + 3, *text(rng, keep % 19)] for keep in kept]
    mixed_before = warm.mixed_steps
    runs = warm.run(*prompts, new=3)
    cold = served.cold()
    for run, keep, prompt in zip(runs, kept, prompts, strict=True):
        alone = cold.run_one(prompt, new=3)
        assert run.cached == keep // warm.cache.hit_unit * warm.cache.hit_unit
        assert torch.equal(run.logits[0], alone.logits[0])
        if warm.executor.batch_invariant:
            assert all(map(torch.equal, run.logits, alone.logits))
    assert warm.mixed_steps > mixed_before


@pytest.mark.parametrize("served", FLOAT32, indirect=True, ids="-".join)
def test_with_the_kernels_logits_are_those_of_transformers(served: Served, own_logits: OwnLogits) -> None:
    assert_logits_are_transformers(own_logits, served.arch, served.warm())


@pytest.mark.parametrize("arch", [*(arch for arch in OF_EACH_KIND if arch in BY_BLOCKS), "lfm3", "zamba2"])
def test_a_hybrid_goes_on_from_where_others_ended_or_parted(paged: ModelFactory, kernels: Kernels, arch: str) -> None:
    """Of a block that is not full: behind an answer, where a prompt left it, before a repeated prompt's end, and where
    a prompt's own sequence wanted it.
    """
    rng, size = random.Random(arch), 2 * CHUNK
    loaded = paged(arch, "bfloat16")
    warm = Driver(loaded, num_blocks=24, kernels=kernels, block_size=size)
    first = text(rng, size + 90)
    answer = warm.run_one(first, new=12).tokens
    ended = len(first) + len(answer) - 1  # the last token of an answer is not computed
    other = [*first[: size + 80], 3]
    prompts = [
        ([*first, *answer, *text(rng, 9)], ended),
        (first, size),  # leaves a checkpoint before its last token
        (first, len(first) - 1),
        ([*other, *text(rng, 70)], size),  # and one where it parts from the first
        ([*other[:-1], 4, *text(rng, 7)], size + 80),
    ]
    hits = [warm.run_one(prompt, new=4) for prompt, _ in prompts]
    guessed = text(rng, size + 100)
    last = len(guessed) - 1
    prompts += [(guessed, 0), (guessed, last), ([*guessed[:last], 5, 6], last)]
    hits += [warm.run_one(prompt, new=4, checkpoints=(last,)) for prompt, _ in prompts[-3:]]
    cold = Driver(loaded, num_blocks=24, kernels=kernels, block_size=size, prefix_cache=False, executor=warm.executor)
    for hit, (prompt, cached) in zip(hits, prompts, strict=True):
        alone = cold.run_one(prompt, new=4)
        assert hit.cached == cached
        assert all(map(torch.equal, hit.logits, alone.logits))
        last = (len(prompt) - 1) // size
        assert torch.equal(hit.kv[:last].view(torch.uint8), alone.kv[:last].view(torch.uint8))
    assert (warm.stats.branch_checkpoints, warm.stats.speculative_checkpoints) == (2, 2)  # an answer, too


@pytest.mark.parametrize("arch", OF_EACH_KIND)
def test_without_the_kernels_logits_are_those_of_transformers(
    paged: ModelFactory, own_logits: OwnLogits, arch: str
) -> None:
    assert_logits_are_transformers(own_logits, arch, Driver(paged(arch)))


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    assert architecture_table.DOCUMENT.read_text() == architecture_table.document(), (
        "python -m tests.architecture_table"
    )
