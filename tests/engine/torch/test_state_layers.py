"""Layers with a state of fixed size: short convolutions row by row, and hits by whole blocks."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d
from transformers import AutoConfig

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import Run
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry
from emberkv.engine.torch.model.inspection import inspect_geometry
from emberkv.engine.torch.model.state_layers import StateGeometry
from emberkv.engine.torch.state_step import ConvolutionStep
from emberkv.errors import ConfigError, UnsupportedModelError
from tests.architectures import ALSO_SUPPORTED
from tests.engine.conftest import DriverFactory, ModelFactory
from tests.engine.driver import BLOCK, CHUNK
from tests.models import VOCAB_SIZE

CHANNELS = 10
SIZE = 4


def pool_for(columns: int, dtype: torch.dtype) -> KVPool:
    convolutions = tuple(StateGeometry(layer, columns, CHANNELS) for layer in (0, 2))
    geometry = ModelGeometry(2, 1, 8, 64, 512, (LayerGeometry(None, None, 1.0),), 512, convolutions, False)
    return KVPool(geometry, dtype, 64, SIZE, torch.device("cpu"))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_however_sequences_are_cut_and_batched_a_row_has_the_bits_of_the_whole(
    columns: int, dtype: torch.dtype, cuts: list[list[int]], has_bias: bool
) -> None:
    """And each block the latest inputs up to its last token."""
    generator = torch.Generator().manual_seed(len(cuts))
    taps = torch.randn(columns + 1, CHANNELS, generator=generator)
    bias = torch.randn(CHANNELS, generator=generator) if has_bias else None
    texts = [torch.randn(sum(each), CHANNELS, generator=generator).to(dtype) for each in cuts]
    pool = pool_for(columns, dtype)
    pool.blocks.fill_(float("nan"))
    tables = [list(range(10 * index, 10 * index + 10)) for index in range(len(cuts))]
    found: list[list[Tensor]] = [[] for _ in cuts]
    for turn in range(max(map(len, cuts))):
        some = [index for index, each in enumerate(cuts) if turn < len(each)]
        runs = [Run(tables[index], sum(cuts[index][:turn]), cuts[index][turn]) for index in some]
        rows = [texts[index][run.start : run.stop] for index, run in zip(some, runs, strict=True)]
        padding = torch.full((turn, CHANNELS), 3.0, dtype=dtype)
        out = ConvolutionStep(pool, runs, columns).convolve(2, torch.cat([*rows, padding]), taps, bias)
        parts = torch.split(out, [*(run.count for run in runs), turn])
        for index, part in zip(some, parts[:-1], strict=True):
            found[index].append(part)
        assert not parts[-1].any()
    for index, text in enumerate(texts):
        whole = ConvolutionStep(pool, [Run(tables[-1], 0, len(text))], columns).convolve(0, text, taps, bias)
        assert torch.equal(torch.cat(found[index]), whole)
        padded = torch.cat([torch.zeros(columns, CHANNELS), text.float()])
        plain = conv1d(padded.t(), taps.t().unsqueeze(1), bias, groups=CHANNELS).t()
        torch.testing.assert_close(whole.float(), plain, rtol=1e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)
        for position in range(-(-len(text) // SIZE)):
            stop = min(len(text), (position + 1) * SIZE)
            assert torch.equal(pool.convolved[2][tables[index][position]].float(), padded[stop : stop + columns])


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("lfm2", "float32"), ("lfm2", "bfloat16"), ("granitemoehybrid", "bfloat16"), ("qwen3_next", "bfloat16")],
)
def test_hits_have_the_logits_and_the_blocks_of_a_cold_run(
    driver: DriverFactory, paged: ModelFactory, arch: str, dtype: str
) -> None:
    """With the kernels and without, after evictions and among sequences that are preempted."""
    rng = random.Random(dtype)
    warm, cold = driver(paged(arch, dtype), num_blocks=36), driver(paged(arch, dtype), prefix_cache=False)
    unit = warm.cache.hit_unit
    compared = 40 if warm.executor.batch_invariant else 1
    stem = text(rng, 3 * CHUNK)
    warm.run_one(stem)
    preemptions = 0
    for tails in ((1, 40, 70), (9, CHUNK, 100)):
        kept = [rng.randrange(BLOCK, len(stem) // 2) for _ in tails]
        prompts = [[*stem[:keep], 3, *text(rng, tail)] for keep, tail in zip(kept, tails, strict=True)]
        for run, keep, prompt in zip(warm.run(*prompts, new=40), kept, prompts, strict=True):
            alone = cold.run_one(prompt, new=compared)
            preemptions += run.sequence.num_preemptions
            assert run.cached % unit == 0
            assert run.cached <= keep
            assert len(alone.logits) == compared
            assert all(map(torch.equal, run.logits, alone.logits))
        prompt = [*stem[:130], *text(rng, 5)]
        hit, alone = warm.run_one(prompt), cold.run_one(prompt)
        whole = len(prompt) // unit * unit // BLOCK
        assert torch.equal(hit.kv[:whole].view(torch.uint8), alone.kv[:whole].view(torch.uint8))
    assert preemptions > 0
    assert warm.stats.hit_tokens > 0
    assert warm.stats.evicted_blocks > 0


@pytest.mark.parametrize("arch", ["granitemoehybrid", "qwen3_next"])
def test_blocks_may_be_larger_than_prefill_chunks(driver: DriverFactory, paged: ModelFactory, arch: str) -> None:
    """A prompt is computed in chunks of 64 tokens all the same where the engine is batch-invariant."""
    size = 2 * CHUNK
    warm = driver(paged(arch), num_blocks=16, block_size=size)
    cold = driver(paged(arch), num_blocks=16, block_size=size, prefix_cache=False)
    native = warm.executor.kernels is not None
    assert warm.executor.prefill_chunk == (CHUNK if native else size)
    assert warm.cache.hit_unit == size
    stem = text(random.Random(arch), 2 * size + 20)
    warm.run_one(stem)
    prompts = [[*stem[: size + 70], 3, 5], [*stem[:size], 7], [*stem, 4]]
    found = (size, size, len(stem) if native else 2 * size)
    for run, prompt, cached in zip(warm.run(*prompts, new=3), prompts, found, strict=True):
        alone = cold.run_one(prompt, new=3)
        assert run.cached == cached
        assert torch.equal(run.logits[0], alone.logits[0])
        if native:
            assert all(map(torch.equal, run.logits, alone.logits))


def test_blocks_are_so_large_that_state_takes_no_more_of_them_than_keys_and_values() -> None:
    convolved = inspect_geometry(AutoConfig.for_model("lfm2", **ALSO_SUPPORTED["lfm2"]))
    assert convolved.default_block_size(torch.float32) == 16
    geometry = inspect_geometry(AutoConfig.for_model("bamba", **ALSO_SUPPORTED["bamba"]))
    state = 2 * (4 * 24 * 32 * 4 + 3 * (128 + 2 * 2 * 24) * 2)
    assert geometry.state_bytes(torch.bfloat16) == state
    per_token = 2 * 2 * 16 * 2
    assert geometry.default_block_size(torch.bfloat16) == 256
    assert 128 * per_token < state < 256 * per_token
    larger = replace(geometry, states=20 * geometry.states)
    assert larger.default_block_size(torch.bfloat16) == 1024


def test_a_block_s_bytes_are_those_of_its_keys_values_and_state() -> None:
    geometry = inspect_geometry(AutoConfig.for_model("lfm2", **ALSO_SUPPORTED["lfm2"]))
    assert [each.layer for each in geometry.states] == [0, 2, 4]
    assert not geometry.ends_with_attention
    keys_and_values, state = 2 * 2 * 2 * 16 * 16, 3 * 2 * 64
    row = 2 * 16 * 16
    assert geometry.block_bytes(torch.float32, 16) == 4 * (keys_and_values + -(-state // row) * row)


def test_a_model_whose_every_layer_is_a_convolution_is_refused() -> None:
    config = AutoConfig.for_model("lfm2", **{**ALSO_SUPPORTED["lfm2"], "layer_types": ["conv"] * 5})
    with pytest.raises(UnsupportedModelError, match="does not go through"):
        inspect_geometry(config)


def test_int8_keys_and_values_are_refused_beside_convolutions() -> None:
    geometry = inspect_geometry(AutoConfig.for_model("lfm2", **ALSO_SUPPORTED["lfm2"]))
    with pytest.raises(ConfigError, match="--kv-dtype int8 does not take a model with short convolutions"):
        KVPool(geometry, torch.int8, 4, 16, torch.device("cpu"), torch.float32)
