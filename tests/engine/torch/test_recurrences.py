"""Linear recurrences over the blocks of the pool: a row's bits, the state in blocks, and the kernels against torch."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import Run
from emberkv.engine.torch.model.geometry import LayerGeometry, ModelGeometry
from emberkv.engine.torch.model.state_layers import StateGeometry
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.native.recurrence import NativeRecurrence
from emberkv.engine.torch.recurrence import Recurrence, UpdateRule
from emberkv.engine.torch.state_step import StateStep, state_step
from emberkv.errors import UnsupportedModelError

SIZE, BLOCKS = 4, 12
LAYER = 1
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Kind:
    """heads, key_heads, depth, width of a state, the rule, and whether it is a gated delta net's."""

    heads: int
    key_heads: int
    depth: int
    width: int
    delta: bool
    normed: bool = True
    gated_first: bool = True

    def recurrence(self) -> Recurrence:
        keys, inner = self.key_heads * self.depth, self.heads * self.width
        state = StateGeometry(LAYER, 3, 2 * keys + inner, self.heads, self.depth, self.width)
        size = (self.width if self.delta else inner // self.key_heads) if self.normed else 0
        rule = UpdateRule(
            self.delta, self.key_heads, 0.0 if self.delta else 0.01, beta_factor=1.5, norm_size=size, epsilon=1e-5,
            gated_first=self.gated_first,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(self.depth)

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conv = nn.Conv1d(state.channels, state.channels, 4, groups=state.channels)
        conv.weight.data, conv.bias.data = some(state.channels, 1, 4), some(state.channels)  # type: ignore[union-attr]
        return Recurrence(
            state, rule, conv, log_decay=some(self.heads), step_bias=some(self.heads),
            skip=None if self.delta else some(self.heads), scale=some(inner) if self.normed else None,
        )  # fmt: skip


KINDS = [
    Kind(4, 2, 24, 20, delta=False),
    Kind(3, 1, 16, 70, delta=False, gated_first=False),
    Kind(2, 1, 5, 8, delta=False, normed=False),
    Kind(4, 2, 20, 16, delta=True, gated_first=False),
    Kind(2, 2, 32, 72, delta=True, gated_first=False),
]


@dataclass
class Text:
    """What the recurrence is given of one sequence's tokens."""

    mixed: Tensor
    gate: Tensor
    steps: Tensor
    betas: Tensor

    @classmethod
    def random(cls, state: StateGeometry, tokens: int, dtype: torch.dtype, seed: int) -> "Text":
        generator = torch.Generator().manual_seed(seed)
        sizes = (state.channels, state.heads * state.width, state.heads, state.heads)
        return cls(*(torch.randn(tokens, size, generator=generator).to(dtype) for size in sizes))

    def rows(self, start: int, stop: int) -> list[Tensor]:
        return [each[start:stop] for each in (self.mixed, self.gate, self.steps, self.betas)]


def pool_for(state: StateGeometry, sequences: int, dtype: torch.dtype) -> KVPool:
    geometry = ModelGeometry(2, 1, 8, 64, 512, (LayerGeometry(None, None, 1.0),), 512, (state,), False, (0,))
    pool = KVPool(geometry, dtype, sequences * BLOCKS, SIZE, torch.device("cpu"))
    pool.blocks.fill_(float("nan"))
    return pool


def compute(layer: nn.Module, pool: KVPool, runs: list[Run], rows: list[list[Tensor]], *, padding: int = 0) -> Tensor:
    mixed, gate, steps, betas = (
        torch.cat([*parts, torch.full((padding, parts[0].shape[1]), 3.0, dtype=parts[0].dtype)])
        for parts in zip(*rows, strict=True)
    )
    with torch.inference_mode(), state_step(StateStep(pool, runs)):
        out: Tensor = layer(mixed, gate, steps, betas)
    return out


def table(index: int) -> list[int]:
    return list(range(index * BLOCKS, (index + 1) * BLOCKS))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS), DTYPES, st.booleans(),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
)  # fmt: skip
def test_however_sequences_are_cut_and_batched_a_row_has_the_bits_of_the_whole(
    kernels: Kernels, kind: Kind, dtype: torch.dtype, native: bool, cuts: list[list[int]]
) -> None:
    """And each block the state behind its last token."""
    plain = kind.recurrence()
    layer: nn.Module = NativeRecurrence(kernels, plain) if native else plain
    state = plain.state
    texts = [Text.random(state, sum(each), dtype, seed) for seed, each in enumerate(cuts)]
    pool = pool_for(state, len(cuts), dtype)
    found: list[list[Tensor]] = [[] for _ in cuts]
    for turn in range(max(map(len, cuts))):
        some = [index for index, each in enumerate(cuts) if turn < len(each)]
        runs = [Run(table(index), sum(cuts[index][:turn]), cuts[index][turn]) for index in some]
        rows = [texts[index].rows(run.start, run.stop) for index, run in zip(some, runs, strict=True)]
        out = compute(layer, pool, runs, rows, padding=turn)
        parts = torch.split(out, [*(run.count for run in runs), turn])
        assert not parts[-1].any()
        for index, part in zip(some, parts[:-1], strict=True):
            found[index].append(part)
    for index, text in enumerate(texts):
        tokens = sum(cuts[index])
        whole = pool_for(state, 1, dtype)
        expected = compute(layer, whole, [Run(table(0), 0, tokens)], [text.rows(0, tokens)])
        assert torch.equal(torch.cat(found[index]), expected)
        filled = -(-tokens // SIZE)
        for states in ("matrices", "convolved"):
            cut, uncut = (getattr(each, states)[LAYER] for each in (pool, whole))
            assert torch.equal(cut[table(index)[:filled]], uncut[:filled])


def test_what_the_kernels_would_read_wrong_is_refused(kernels: Kernels) -> None:
    plain = KINDS[3].recurrence()
    layer, rows = NativeRecurrence(kernels, plain), Text.random(plain.state, 5, torch.bfloat16, 0).rows(0, 5)
    run = [Run(table(0), 0, 5)]
    with pytest.raises(UnsupportedModelError, match=r"torch\.float32, torch\.bfloat16; they take"):
        compute(layer, pool_for(plain.state, 1, torch.float32), run, [rows])
    mixed, gate, steps, betas = rows
    pool = pool_for(plain.state, 1, torch.bfloat16)
    apart = torch.stack([steps, steps], dim=-1)[..., 0]
    with (
        state_step(StateStep(pool, run)),
        pytest.raises(UnsupportedModelError, match="given steps whose values lie 2 apart"),
    ):
        layer(mixed, gate, apart, betas)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), DTYPES, st.integers(1, 30))
def test_the_kernels_compute_what_torch_computes(kernels: Kernels, kind: Kind, dtype: torch.dtype, tokens: int) -> None:
    plain = kind.recurrence()
    text = Text.random(plain.state, tokens, dtype, seed=tokens)
    pools = [pool_for(plain.state, 1, dtype) for _ in range(2)]
    layers = (plain, NativeRecurrence(kernels, plain))
    ours, theirs = (
        compute(layer, pool, [Run(table(0), 0, tokens)], [text.rows(0, tokens)])
        for layer, pool in zip(layers, pools, strict=True)
    )
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)
    last = (tokens - 1) // SIZE
    states = [pool.matrices[LAYER][last] for pool in pools]
    torch.testing.assert_close(states[1], states[0], rtol=tolerance, atol=tolerance)
