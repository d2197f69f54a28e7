"""Attention over the paged pool, plugged into transformers through its AttentionInterface.

The model is called on packed tokens ``[1, tokens]`` without a cache of its own. Each attention layer hands its new
queries, keys and values to the *step* in force: the step writes K and V into the pool and attends over the pool.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import AttentionInterface

from emberkv.engine.torch.attention.runs import Run

ATTENTION_NAME = "emberkv_paged"


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer asks for. window: a query sees the ``window`` latest keys, its own included; None: all."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class RowsLeft:
    """Rows of a pass, of which there are ``of``, whose results are still wanted. index: int64, ascending."""

    index: Tensor
    of: int


class AttentionStep(ABC):
    """The batch whose attention is being computed.

    rows_left: None while all rows are wanted. After the last layer's attention no row needs another one, and those
    without wanted logits need nothing more; a step may leave them, and layers after it can.
    """

    rows_left: RowsLeft | None = None

    @abstractmethod
    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries ``[tokens, heads, dim]``, keys and values ``[tokens, kv_heads, dim]``: the new tokens'.

        Returns ``[tokens, heads, dim]`` in the queries' dtype.
        """


class AttentionBackend(Protocol):
    """Makes steps over one pool."""

    def step(self, runs: Sequence[Run], wanted: Sequence[int]) -> AttentionStep:
        """For all runs' rows, one run after the other; rows after them are padding.

        wanted: the rows whose logits are, ascending.
        """
        ...


_current_step: ContextVar[AttentionStep] = ContextVar("emberkv_attention_step")


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Within this context, the model's attention layers work on ``step``."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def rows_left() -> RowsLeft | None:
    """Those of the step in force; None where all rows are wanted, or where there is no step."""
    step = _current_step.get(None)
    return None if step is None else step.rows_left


class _AttentionLayer(Protocol):
    """What transformers' attention modules have in common."""

    layer_idx: int


def _paged_attention(
    module: _AttentionLayer,
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
    call = LayerCall(int(module.layer_idx), scale, sliding_window, softcap)
    out = _current_step.get().attend(
        call,
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
