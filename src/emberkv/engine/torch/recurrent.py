"""Layers that keep state beside keys and values, over the blocks of the pool: LFM2's short convolutions.

A block holds the state after the last token that was computed into it. So the state before a run of tokens lies in the
block of the token before it, and any sequence whose prefix ends with a full block can continue from it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import Run, place_attention
from emberkv.engine.torch.model.short_convolution import is_short_convolution


class ConvolutionStep:
    """The convolutions of one pass over all runs' rows, one run after the other; rows after them are padding.

    The runs' inputs are laid end to end, each behind the ``columns`` inputs before its first token.
    """

    def __init__(self, pool: KVPool, runs: Sequence[Run], columns: int) -> None:
        self._pool = pool
        self._columns = columns
        size, device = pool.block_size, pool.device
        first, row = 0, 0
        self._heads: list[slice] = []  # of each run, where what is before it lies
        before: list[int] = []  # of each run, the block with that; any, where nothing is
        fresh: list[int] = []  # runs before which nothing is
        rows: list[int] = []  # where each row's own input lies
        written: list[int] = []  # blocks that get a state
        ends: list[int] = []  # where each of these states begins
        for index, run in enumerate(runs):
            self._heads.append(slice(row, row + run.count))
            row += run.count
            before.append(run.block_ids[max(0, run.start - 1) // size])
            fresh += [index] if run.start == 0 else []
            rows += range(first + columns, first + columns + run.count)
            for block in range(run.start // size, -(-run.stop // size)):
                written.append(run.block_ids[block])
                ends.append(first + min(run.stop, (block + 1) * size) - run.start)
            first += columns + run.count
        self._before = torch.tensor(before, device=device)
        self._fresh = torch.tensor(fresh, dtype=torch.int64, device=device)
        self._rows = torch.tensor(rows, device=device) - columns
        self._written = torch.tensor(written, device=device)
        self._states = torch.tensor(ends, device=device).unsqueeze(1) + torch.arange(columns, device=device)

    def convolve(self, layer: int, inputs: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        """``[rows, channels]``, of which each channel is the sum of ``taps``, fp32 ``[columns + 1, channels]``, times
        the inputs up to the row's own. It is computed in fp32, and is zero for padding.

        Products and sums are torch's own operations on single values, which round alike wherever a row lies.
        """
        state = self._pool.states[layer]
        before = state[self._before]
        before[self._fresh] = 0
        laid = torch.cat([part for i, at in enumerate(self._heads) for part in (before[i], inputs[at])])
        state[self._written] = laid[self._states]
        wide = laid.float()
        count = wide.shape[0] - self._columns
        total = wide[:count] * taps[0]
        for column in range(1, self._columns + 1):
            total += wide[column : column + count] * taps[column]
        if bias is not None:
            total += bias
        out = torch.zeros_like(inputs)
        out[: self._rows.shape[0]] = total[self._rows].to(inputs.dtype)
        return out


_current_step: ContextVar[ConvolutionStep] = ContextVar("emberkv_convolution_step")


@contextmanager
def convolution_step(step: ConvolutionStep) -> Iterator[None]:
    """Within this context, the model's convolutions work on ``step``."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


class ShortConvolution(nn.Module):
    """A short convolution of a model, over the blocks of the pool."""

    taps: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = int(layer.layer_idx)
        self.in_proj, self.out_proj = layer.in_proj, layer.out_proj
        conv: nn.Conv1d = layer.conv
        self.register_buffer("taps", conv.weight.detach().squeeze(1).t().float().contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().float())

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """hidden_states: ``[1, rows, channels]``."""
        scale, gate, inputs = self.in_proj(hidden_states).chunk(3, dim=-1)
        convolved = _current_step.get().convolve(self.layer, (scale * inputs)[0], self.taps, self.bias)
        out: Tensor = self.out_proj(gate * convolved)
        return out


class GatedFeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``, by the names under which the kernels look for the parts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer.w1, layer.w3, layer.w2
        self.act_fn = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return out


def use_recurrent_state(model: nn.Module, pool: KVPool) -> int:
    """Put layers that keep their state in the pool in the place of a model's own. Returns the number of such layers."""
    convolutions = pool.geometry.convolutions
    if not convolutions:
        return 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_short_convolution(child):
                setattr(parent, name, ShortConvolution(child))
            elif type(child).__name__ in _FEED_FORWARDS:
                setattr(parent, name, GatedFeedForward(child))
    convolved = {each.layer for each in convolutions}
    count = len(convolutions) + pool.geometry.num_layers
    place_attention(model, [layer for layer in range(count) if layer not in convolved])
    return len(convolutions)


_FEED_FORWARDS = ("Lfm2MLP", "Lfm2MoeMLP")
"""Those that call the activation as a function, where none can see it."""
