"""Attention by torch's own operations, on any device: a step for each piece of a prompt, one for all decodes."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from emberkv.engine.torch.attention.decode_step import DecodeStep
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import AttentionStep, LayerCall
from emberkv.engine.torch.attention.prefill_step import PrefillStep
from emberkv.engine.torch.attention.runs import Run


class TorchAttention:
    """tile: prefill attends in tiles cut at absolute multiples of so many tokens; see `PrefillStep`."""

    def __init__(self, pool: KVPool, tile: int) -> None:
        self._pool = pool
        self._tile = tile

    def step(self, runs: Sequence[Run], wanted: Sequence[int]) -> AttentionStep:
        parts: list[tuple[int, AttentionStep]] = []
        for decode, group in groupby(runs, key=lambda run: run.decode):
            some = list(group)
            if decode:
                step = DecodeStep(self._pool, [run.block_ids for run in some], [run.stop for run in some])
                parts.append((len(some), step))
                continue
            for run in some:
                parts.append((run.count, PrefillStep(self._pool, run.block_ids, run.start, run.count, tile=self._tile)))
        return _PackedStep(parts)


class _PackedStep(AttentionStep):
    """Several steps in one forward pass: each has its own consecutive rows, in order; rows after them are padding.

    parts: the steps with their numbers of rows. A later part sees what an earlier one has written.
    """

    def __init__(self, parts: list[tuple[int, AttentionStep]]) -> None:
        self._rows = [rows for rows, _ in parts]
        self._steps = [step for _, step in parts]

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        padding = queries.shape[0] - sum(self._rows)
        shares = zip(*(torch.split(each, [*self._rows, padding]) for each in (queries, keys, values)), strict=True)
        parts = [step.attend(call, *share) for step, share in zip(self._steps, shares, strict=False)]
        return torch.cat([*parts, torch.zeros_like(queries[:padding])])
