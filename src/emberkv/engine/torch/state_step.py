"""A pass over the state of fixed size in blocks: where it lies before each run of tokens, and where it goes behind it.

A block holds the state after the last token that was computed into it. So the state before a run of tokens lies in the
block of the token before it, and any sequence whose prefix ends with a full block can continue from it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import Run


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
        state = self._pool.convolved[layer]
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


class StateStep:
    """One pass over all runs' rows, one run after the other; rows after them are padding."""

    def __init__(self, pool: KVPool, runs: Sequence[Run]) -> None:
        self.pool = pool
        self.runs = runs
        self._convolutions: dict[int, ConvolutionStep] = {}
        self._arrays: tuple[NDArray[np.int32], NDArray[np.int64]] | None = None

    def convolution(self, columns: int) -> ConvolutionStep:
        """That of layers which see ``columns`` earlier tokens."""
        if columns not in self._convolutions:
            self._convolutions[columns] = ConvolutionStep(self.pool, self.runs, columns)
        return self._convolutions[columns]

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Of each run its `StateRun` of calls.hpp, ``[runs, 4]``; and all block tables, end to end."""
        if self._arrays is None:
            rows, tables = 0, 0
            found = []
            for run in self.runs:
                found.append((rows, run.count, run.start, tables))
                rows += run.count
                tables += len(run.block_ids)
            block_ids = np.array([block_id for run in self.runs for block_id in run.block_ids], dtype=np.int64)
            self._arrays = np.array(found, dtype=np.int32), block_ids
        return self._arrays


_current_step: ContextVar[StateStep] = ContextVar("emberkv_state_step")


@contextmanager
def state_step(step: StateStep) -> Iterator[None]:
    """Within this context, the model's layers with a state work on ``step``."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def current_state_step() -> StateStep:
    """The step in force."""
    return _current_step.get()
