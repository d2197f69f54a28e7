"""Keys and values in 8 bits: the bytes that are stored, and attention over them, by torch and by the kernels."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emberkv.engine.torch.attention.int8_kv import QuantisedHeads
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import AttentionStep, LayerCall, Run
from emberkv.engine.torch.attention.torch_attention import TorchAttention
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry, Window
from emberkv.engine.torch.native.attention import NativeAttention
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import ConfigError
from tests.engine.torch.attention.test_paged_attention import expected

CPU = torch.device("cpu")
CALL = LayerCall(1, 0.25, None, None)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16]


def pool_of(
    dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, dim: int = 16, block_size: int = 16, num_blocks: int = 64
) -> KVPool:
    """A pool in which what is read before it is written is as large as it can be, times NaN."""
    geometry = ModelGeometry(heads, kv_heads, dim, 10, 4096, (LayerGeometry(None, None, 1.0),) * 2)
    pool = KVPool(geometry, torch.int8, num_blocks, block_size, CPU, dtype)
    pool.storage.fill_(127)
    return pool


class Text:
    """Random queries, keys and values ``[tokens, heads, dim]`` of one sequence, in blocks at random places.

    layer: whose heads they have.
    """

    def __init__(self, pool: KVPool, length: int, seed: int = 0, layer: int = CALL.layer) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = pool.geometry.head_shapes()[layer]
        heads = shape.heads, shape.kv_heads, shape.kv_heads
        made = [torch.randn(length, n, shape.dim, generator=generator) for n in heads]
        self.q, self.k, self.v = (each.to(pool.activations) for each in made)
        count = -(-length // pool.block_size)
        self.block_ids = random.Random(seed).sample(range(pool.num_blocks), count)

    def __len__(self) -> int:
        return self.q.shape[0]

    def compute(self, pool: KVPool, kernels: Kernels | None, call: LayerCall, cuts: list[int]) -> Tensor:
        """In pieces, those of one token as decode steps."""
        parts = []
        for start, stop in pairwise([0, *cuts, len(self)]):
            run = Run(self.block_ids, start, stop - start, decode=start > 0 and stop - start == 1)
            step = step_of(pool, kernels, [run])
            parts.append(step.attend(call, self.q[start:stop], self.k[start:stop], self.v[start:stop]))
        return torch.cat(parts)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are stored, in double precision."""
        return QuantisedHeads.of(self.k).values(torch.float64), QuantisedHeads.of(self.v).values(torch.float64)


def step_of(pool: KVPool, kernels: Kernels | None, runs: list[Run]) -> AttentionStep:
    wanted = list(range(sum(run.count for run in runs)))
    if kernels is None:
        return TorchAttention(pool, 16).step(runs, wanted)
    return NativeAttention(pool, kernels).step(runs, wanted)


def test_a_head_is_rounded_by_itself() -> None:
    values = torch.tensor([[[1.0, -127.0, 0.4, 62.5], [1e-3, 2e-3, -3e-3, 4e-3]], [[0.0] * 4, [1e30, 0.0, 1.0, -3e30]]])
    integers, scales = QuantisedHeads.of(values)
    assert scales[0, 0] == 1
    assert integers[0, 0].tolist() == [1, -127, 0, 62]
    assert (scales[1, 0], integers[1, 0].tolist()) == (0, [0] * 4)
    assert integers[0, 1].tolist() == [32, 63, -95, 126]
    for each, scale in zip(values.flatten(0, 1), scales.flatten(), strict=True):
        most = float(each.abs().max())
        assert most / 127 <= float(scale) <= most / 127 * (1 + 2**-7)
    error = (QuantisedHeads(integers, scales).values(torch.float64) - values.double()).abs()
    assert (error <= scales.double().unsqueeze(-1) / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_head_that_is_not_finite_stays_so(bad: float) -> None:
    values = torch.tensor([[1.0, bad, 3.0]])
    assert QuantisedHeads.of(values).values(torch.float32).isnan().all()


ODD_HEADS = [[0.0], [1e-45], [1e-40], [3e38, 1.0], [float("nan"), 1.0], [float("inf"), 2.0], [-127.0, 0.5, 1.5, -2.5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "block_size"), [(16, 16), (20, 6), (2, 2), (136, 32)])
def test_the_kernels_store_the_bytes_that_torch_stores(
    kernels: Kernels, dtype: torch.dtype, dim: int, block_size: int
) -> None:
    ours, theirs = (pool_of(dtype, dim=dim, block_size=block_size) for _ in range(2))
    text = Text(ours, min(70, 3 * block_size + 1))
    for at, head in enumerate(ODD_HEADS[: len(text)]):
        text.k[at, 0] = text.v[-1 - at, 1] = torch.tensor(head * dim)[:dim].to(dtype)
    for pool in (ours, theirs):
        pool.clear(list(range(pool.num_blocks)))
    text.compute(ours, kernels, CALL, [1])
    text.compute(theirs, None, CALL, [])
    assert torch.equal(ours.storage, theirs.storage)
    keys, values = theirs.gather(CALL.layer, theirs.index_of(text.block_ids))
    for stored, given_values in ((keys, text.k), (values, text.v)):
        wanted = QuantisedHeads.of(given_values).values(dtype)
        torch.testing.assert_close(stored[: len(text)], wanted, rtol=0, atol=0, equal_nan=True)


CALLS = [
    CALL,
    LayerCall(1, 0.25, Window(100), 2.0),
    LayerCall(1, 0.25, Window(100, chunked=True), None),
    LayerCall(1, 0.25, None, None, torch.tensor([-40.0, -1.0, 2.5, 30.0])),
    LayerCall(1, 0.25, None, None, slopes=torch.tensor([0.5, 0.1, 0.02, 0.001])),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS, ids=["all", "window", "chunks", "sinks", "alibi"])
@pytest.mark.parametrize("by", ["torch", "native"])
def test_it_is_attention_over_what_is_stored(kernels: Kernels, dtype: torch.dtype, call: LayerCall, by: str) -> None:
    pool = pool_of(dtype)
    text = Text(pool, kernels.span + 65)
    cuts = [32, 320, len(text) - 1]
    ours = text.compute(pool, kernels if by == "native" else None, call, cuts)
    torch.testing.assert_close(ours.double(), expected(call, text.q, *text.rounded()), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 20), (6, 1, 64), (7, 1, 82), (2, 1, 136)])
def test_heads_of_any_size(kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    pool = pool_of(dtype, heads, kv_heads, dim)
    call = LayerCall(1, dim**-0.5, None, None)
    text = Text(pool, 150)
    ours = text.compute(pool, kernels, call, [1, 40])
    torch.testing.assert_close(ours.double(), expected(call, text.q, *text.rounded()), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [2, 6, 8, 32, 1024])
def test_blocks_of_any_size_give_the_same_bits(kernels: Kernels, dtype: torch.dtype, block_size: int) -> None:
    usual, other = pool_of(dtype), pool_of(dtype, block_size=block_size, num_blocks=400)
    first, second = Text(usual, 600), Text(other, 600)
    assert torch.equal(first.compute(usual, kernels, CALL, []), second.compute(other, kernels, CALL, [7, 513]))


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 599), max_size=5), st.sampled_from(DTYPES), st.sampled_from(CALLS))
def test_any_cut_gives_the_same_bits_and_bytes(
    kernels: Kernels, cuts: set[int], dtype: torch.dtype, call: LayerCall
) -> None:
    pools = [pool_of(dtype) for _ in range(2)]
    text = Text(pools[0], 600)
    whole, pieces = (
        text.compute(pool, kernels, call, given_cuts)
        for pool, given_cuts in zip(pools, ([], sorted(cuts)), strict=True)
    )
    assert torch.equal(whole, pieces)
    assert torch.equal(pools[0].storage, pools[1].storage)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_a_pass_change_no_bit(kernels: Kernels, dtype: torch.dtype) -> None:
    """Sequences that share whole spans of a prefix, whose last tokens are computed together and alone."""
    pool = pool_of(dtype, num_blocks=160)
    stem = Text(pool, 1100)
    stem.compute(pool, kernels, CALL, [])
    runs = [Run(stem.block_ids, stop - 1, 1, decode=True) for stop in (1060, 1100)]
    q, k, v = (torch.cat([each[run.start : run.stop] for run in runs]) for each in (stem.q, stem.k, stem.v))
    together = step_of(pool, kernels, runs).attend(CALL, q, k, v)
    for at, run in enumerate(runs):
        alone = step_of(pool, kernels, [run]).attend(CALL, q[at : at + 1], k[at : at + 1], v[at : at + 1])
        assert torch.equal(together[at], alone[0])


def test_a_pool_takes_half_the_bytes_and_a_scale_for_each_head() -> None:
    geometry = ModelGeometry(14, 2, 64, 10, 4096, (LayerGeometry(None, None, 1.0),) * 24)
    wide, narrow = geometry.bytes_per_token(torch.bfloat16), geometry.bytes_per_token(torch.int8)
    assert (wide, narrow) == (12_288, 6_336)  # 64 + 2 bytes a head in place of 128
    pools = [KVPool.of_bytes(geometry, kind, 2**20, 16, CPU, torch.bfloat16) for kind in (torch.bfloat16, torch.int8)]
    assert [pool.num_blocks for pool in pools] == [5, 10]
    assert pools[1].block_bytes == 16 * narrow
    assert pools[1].num_bytes <= 2**20


def test_blocks_can_be_read_and_put_back() -> None:
    pool = pool_of(torch.bfloat16)
    text = Text(pool, 32)
    text.compute(pool, None, CALL, [])
    first, second = text.block_ids
    contents = pool.read_blocks([first])
    other = next(iter(set(range(pool.num_blocks)) - {first, second}))
    pool.write_block(other, contents[0])
    assert torch.equal(pool.storage[other], pool.storage[first])


@pytest.mark.parametrize(("dim", "block_size"), [(15, 16), (16, 15)])
def test_odd_sizes_are_refused(dim: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"here heads are of {dim} and blocks of {block_size}: use --kv-dtype auto"):
        pool_of(torch.bfloat16, dim=dim, block_size=block_size)
