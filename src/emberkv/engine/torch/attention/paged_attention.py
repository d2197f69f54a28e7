"""Attention over the paged pool, plugged into transformers through its AttentionInterface.

The model is called on packed tokens ``[1, tokens]`` without a cache of its own. Each attention layer hands its new
queries, keys and values to the *step* in force: the step writes K and V into the pool and attends over the pool.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig

from emberkv.engine.torch.model.geometry import Window
from emberkv.engine.torch.model.inspection import window_of
from emberkv.engine.torch.model.latent import into_latents, out_of_latents


@dataclass(frozen=True, slots=True)
class Run:
    """New tokens ``[start, start + count)`` of one sequence.

    block_ids: its block table, covering at least ``start + count`` tokens. decode: the one token is the sequence's
    latest, computed to continue it; otherwise the run is a piece of a prompt.
    """

    block_ids: list[int]
    start: int
    count: int
    decode: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.count


def shared_prefixes(
    block_tables: list[list[int]], lengths: list[int], block_size: int, min_tokens: int
) -> list[tuple[list[int], int]]:
    """Groups of sequences whose block tables begin alike, with the number of common full blocks of each group.

    A group has at least two members; its common blocks hold at least ``min_tokens``, none of them the new token. Of all
    ways to group the sequences, this one saves the most block reads: a group reads its common blocks once instead of
    once for each member.

    block_tables: block ids, where equal ids at one place follow equal ids. lengths: tokens, the new one included.
    """
    full = [table[: (length - 1) // block_size] for table, length in zip(block_tables, lengths, strict=True)]
    grouping = _PrefixTree(full, max(1, -(-min_tokens // block_size))).best()
    return sorted((sorted(members), blocks) for members, blocks in grouping.groups)


class _Grouping(NamedTuple):
    """groups: members and common blocks of each. loose: the members of none. value: block reads that are saved, and
    what the loose members are worth to a group nearer to the root.
    """

    value: int
    groups: tuple[tuple[list[int], int], ...]
    loose: tuple[int, ...]


class _PrefixTree:
    """Block tables as a tree. A node is a range of the tables in sorted order, which all begin with the same blocks.

    least: the fewest common blocks of a group.
    """

    def __init__(self, tables: list[list[int]], least: int) -> None:
        self._order = sorted(range(len(tables)), key=tables.__getitem__)
        self._sorted = [tables[index] for index in self._order]
        self._least = least
        self._known: dict[tuple[int, int, int], _Grouping] = {}

    def best(self) -> _Grouping:
        return self._best(0, len(self._order), 0, 0)

    def _best(self, start: int, stop: int, common: int, worth: int) -> _Grouping:
        """The best grouping of a node. worth: block reads that each loose member saves elsewhere.

        Either no group ends at the node, or one does, and takes all that its subtrees leave loose.
        """
        if stop - start < 2:
            return _Grouping(worth * (stop - start), (), tuple(self._order[start:stop]))
        key = (start, stop, worth)
        if key not in self._known:
            first, last = self._sorted[start], self._sorted[stop - 1]
            while common < min(len(first), len(last)) and first[common] == last[common]:
                common += 1
            grouping = self._of_subtrees(start, stop, common, worth)
            if common >= self._least:
                value, groups, members = self._of_subtrees(start, stop, common, common)
                if value - common > grouping.value:
                    grouping = _Grouping(value - common, (*groups, (list(members), common)), ())
            self._known[key] = grouping
        return self._known[key]

    def _of_subtrees(self, start: int, stop: int, common: int, worth: int) -> _Grouping:
        value, groups, loose = 0, list[tuple[list[int], int]](), list[int]()
        for key, indices in groupby(range(start, stop), key=lambda index: self._sorted[index][common : common + 1]):
            members = list(indices)
            if key:
                found = self._best(members[0], members[-1] + 1, common, worth)
            else:  # their tables end here
                found = _Grouping(worth * len(members), (), tuple(self._order[index] for index in members))
            value += found.value
            groups += found.groups
            loose += found.loose
        return _Grouping(value, tuple(groups), tuple(loose))


ATTENTION_NAME = "emberkv_paged"

_PLACE = "emberkv_place"


def place_attention(model: nn.Module, layers: Sequence[int]) -> None:
    """Give the attention of the model's ``layers``, which not all of its layers are, their places in the pool."""
    places = {layer: place for place, layer in enumerate(layers)}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer in places:
            vars(module)[_PLACE] = places[layer]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer asks for.

    layer: its place in the pool, among the layers with attention.
    window: None where a query sees all keys up to its own. sinks: fp32 ``[heads]``, of each head a score that has a
    weight in the softmax and no value (gpt-oss). slopes: fp32 ``[heads]``, of each head what a score loses for each
    token between query and key (ALiBi).
    """

    layer: int
    scale: float
    window: Window | None
    softcap: float | None
    sinks: Tensor | None = None
    slopes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ActiveRows:
    """Rows of a pass, of which there are ``of``, whose results are still wanted. index: int64, ascending."""

    index: Tensor
    of: int


class AttentionStep(ABC):
    """The batch whose attention is being computed.

    active_rows: None while all rows are wanted. After the last layer's attention no row needs another one, and those
    without wanted logits need nothing more; a step may leave them, and layers after it can.
    """

    active_rows: ActiveRows | None = None

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


def active_rows() -> ActiveRows | None:
    """Those of the step in force; None where all rows are wanted, or where there is no step."""
    step = _current_step.get(None)
    return None if step is None else step.active_rows


class PassedPositions:
    """Stands in for transformers' cache where layers ask it which positions they compute; it keeps no state.

    positions: ``[1, tokens]`` of a pass, in any order.
    """

    def __init__(self, positions: Tensor) -> None:
        self._before = positions[0] - torch.arange(positions.shape[1], device=positions.device)

    @staticmethod
    def wanted_by(model: nn.Module) -> bool:
        """Whether a layer scales its queries by their positions, and takes these from its cache (Llama 4)."""
        return any(getattr(module, "attn_temperature_tuning", False) for module in model.modules())

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """What is to be added to each token's place in the pass, ``[tokens]``: of one sequence, the tokens before."""
        return self._before

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return keys, values


class _AttentionLayer(Protocol):
    """What transformers' attention modules have in common."""

    layer_idx: int
    config: PretrainedConfig


def _paged_attention(
    module: _AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[1, heads, tokens, dim]`` in, ``[1, tokens, heads, dim]`` out."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks = None if s_aux is None else s_aux.float().contiguous()
    layer = int(module.layer_idx)
    place = vars(module).get(_PLACE, layer)
    call = LayerCall(place, scale, window_of(module.config, layer, sliding_window), softcap, sinks, alibi_slopes)
    query, width = into_latents(module, query), value.shape[-1]
    wider = max(key.shape[-1], width)
    out = _current_step.get().attend(call, *(_rows(each, wider) for each in (query, key, value)))
    return out_of_latents(module, out[..., :width]).unsqueeze(0), None


def _rows(heads: Tensor, width: int) -> Tensor:
    """``[1, heads, tokens, dim]`` as ``[tokens, heads, width]``, padded with zeros, which add nothing to scores."""
    rows = heads.squeeze(0).transpose(0, 1)
    return pad(rows, (0, width - rows.shape[-1])) if rows.shape[-1] < width else rows


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
