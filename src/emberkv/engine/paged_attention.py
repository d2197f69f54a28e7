"""Attention over the paged pool, plugged into transformers through its AttentionInterface.

The model is called on packed tokens ``[1, tokens]`` without a cache of its own. Each attention layer hands its new
queries, keys and values to the *step* in force: the step writes K and V into the pool and attends over the pool. A
prefill step is one sequence's chunk; a decode step is one new token of each of many sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "emberkv_paged"


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer asks for. window: a query sees the ``window`` latest keys, its own included; None: all."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None


class AttentionStep(ABC):
    """The batch whose attention is being computed."""

    @abstractmethod
    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries ``[tokens, heads, dim]``, keys and values ``[tokens, kv_heads, dim]``: the new tokens'.

        Returns ``[tokens, heads, dim]`` in the queries' dtype.
        """


class PackedStep(AttentionStep):
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


_current_step: ContextVar[AttentionStep] = ContextVar("emberkv_attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Within this context, the model's attention layers work on ``step``."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[1, heads, tokens, dim]`` in, ``[1, tokens, heads, dim]`` out."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = LayerCall(int(module.layer_idx), scale, sliding_window, softcap)  # type: ignore[arg-type]
    out = _current_step.get().attend(
        call,
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
