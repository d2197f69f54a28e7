"""Attention by torch's own operations, on any device: a step for each piece of a prompt, one for all decodes.

Consecutive query heads share a KV head. They are folded into the query axis of that head, so that keys and values are
never copied per query head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from emberkv.engine.torch.attention.kv_pool import KVPool, Scratch
from emberkv.engine.torch.attention.paged_attention import (
    AttentionStep,
    LayerCall,
    Run,
    shared_prefixes,
)
from emberkv.engine.torch.model.geometry import Window, first_seen

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

SCORES_PER_PASS = 8 * 2**20
"""Scores held at once, as far as whole KV heads allow: 16 MiB in bf16, which a cache of the last level holds."""


def tile_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    masked: Tensor,
    *,
    softcap: float | None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    first_key: int = 0,
    scratch: Scratch,
) -> Tensor:
    """Attention of one tile: queries ``[tokens, heads, dim]``, keys and values ``[kv_heads, keys, dim]``.

    masked: bool ``[tokens or more, n]``, what a query must not see of the last ``n`` keys; it sees all earlier ones.
    softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2). sinks, slopes: as in `LayerCall`. first_key:
    position of the first key, relative to the first query's.

    Scores are kept in the queries' dtype and the softmax is computed in fp32, like transformers' eager attention.
    Plain matrix products are used because they run at full speed in bf16 on CPUs, where the fused kernel does not.
    Which products are formed depends on the shapes only, so equal tiles give equal bits.
    """
    tokens, heads, dim = queries.shape
    kv_heads, length = keys.shape[:2]
    groups = heads // kv_heads
    folded = (queries * scale).transpose(0, 1).reshape(kv_heads, groups * tokens, dim)
    out = torch.empty_like(folded)
    heads_per_pass = max(1, min(kv_heads, SCORES_PER_PASS // (groups * tokens * length)))
    for first in range(0, kv_heads, heads_per_pass):
        some = range(first, min(first + heads_per_pass, kv_heads))
        columns = scratch.take((len(some), groups * tokens, length + (sinks is not None)), queries.dtype)
        scores = columns[..., :length]
        # Head by head: a batched product would copy keys that are a slice of a longer sequence's.
        for head, head_scores in zip(some, scores, strict=True):
            torch.mm(folded[head], keys[head].t(), out=head_scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        by_head = columns.view(-1, groups, tokens, columns.shape[-1])
        if slopes is not None:
            at = torch.arange(tokens, device=queries.device).unsqueeze(1)
            distances = torch.arange(first_key, first_key + length, device=queries.device) - at
            by_head[..., :length] += slopes.view(kv_heads, groups, 1, 1)[some.start : some.stop] * distances
        by_head[..., length - masked.shape[1] : length].masked_fill_(masked[:tokens], float("-inf"))
        if sinks is not None:
            by_head[..., length] = sinks.view(kv_heads, groups, 1)[some.start : some.stop]
        torch.softmax(columns, dim=-1, out=columns)
        for head, head_scores in zip(some, scores, strict=True):
            torch.mm(head_scores, values[head], out=out[head])
    return out.view(heads, tokens, dim).transpose(0, 1)


def has_partial_kernel(device: torch.device) -> bool:
    """Whether `partial_attention` runs on this device."""
    return device.type == "cpu"


def partial_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, with the log-sum-exp of its scores, by which it can be merged with the rest.

    queries ``[batch, heads, queries, dim]``, keys and values ``[batch, kv_heads, keys, dim]``; gives the output, of
    the queries' shape, and fp32 ``[batch, heads, queries]``. mask: additive, broadcast over heads and queries.
    """
    batch, heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    folded = queries.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    out, lse = _flash_cpu(folded, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, length, dim), lse.reshape(batch, heads, length)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The attention over both key sets, in fp32.

    With out = sum(exp(s) v) / sum(exp(s)) and lse = log(sum(exp(s))), the union's output is the mean of the two
    weighted by exp(lse), and one weight is sigmoid(lse_first - lse_second).
    """
    weight = torch.sigmoid(first[1] - second[1]).unsqueeze(-1)
    return torch.lerp(second[0].float(), first[0].float(), weight)


def with_sinks(partial: tuple[Tensor, Tensor], sinks: Tensor) -> Tensor:
    """The attention over all keys, of shapes as in `partial_attention`, once ``sinks`` take their part of the softmax.

    A sink of score s leaves the keys, whose weights sum to exp(lse), a share of exp(lse) / (exp(lse) + exp(s)).
    """
    return partial[0] * torch.sigmoid(partial[1] - sinks.view(1, -1, 1)).unsqueeze(-1)


def masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor,
    *,
    softcap: float | None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention under a boolean mask ``[batch, 1, 1, keys]``, on any device; shapes as in `partial_attention`.

    bias: fp32 ``[batch, heads, 1, keys]``, added to the scores.
    """
    if softcap is None and sinks is None and bias is None:
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf")).float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[2]]
    return weights.to(queries.dtype) @ values


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries attended over together. rows: which of the chunk's tokens; keys: which of the gathered keys.

    first_key: position of the first of these keys, relative to the first query's.
    """

    rows: slice
    keys: slice
    first_key: int
    masked: Tensor  # bool [tile, n]: not to be seen of the last n keys


class PrefillStep(AttentionStep):
    """Tokens ``[start, start + length)`` of one sequence; ``start`` is a multiple of ``tile`` and the block size.

    block_ids: the sequence's block table, covering at least ``start + length`` tokens. tile: attention is computed in
    tiles cut at absolute multiples of so many tokens, so that a token's result does not depend on the chunk it is in.

    A whole tile at a position always has the same shape. The number of keys is rounded up to one of a few, and a
    prompt's last tile is filled up, with zeros that no query sees: oneDNN keeps close to a megabyte for each shape met.
    """

    def __init__(self, pool: KVPool, block_ids: list[int], start: int, length: int, *, tile: int) -> None:
        self._pool = pool
        self._start = start
        self._stop = start + length
        self._tile = tile
        whole, rest = divmod(self._stop, pool.block_size)
        pool.clear(block_ids[whole : whole + 1] if rest else [])
        index = pool.index_of(block_ids)
        positions = torch.arange(start, self._stop, device=pool.device)
        self._written = index[positions // pool.block_size], positions % pool.block_size
        self._blocks = index[: -(-self._stop // pool.block_size)]
        self._views: dict[Window | None, tuple[Tensor, int, list[_Tile]]] = {}

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv_layer = self._pool.kv_layers[call.layer]
        self._pool.write(kv_layer, *self._written, keys, values)
        blocks, count, tiles = self._view(call.window)
        # One copy to head-major order costs far less than products over strided keys, tile after tile.
        all_keys, all_values = self._pool.gather_heads(kv_layer, blocks, count)
        parts = [
            tile_attention(
                self._filled(queries[tile.rows]),
                all_keys[:, tile.keys],
                all_values[:, tile.keys],
                call.scale,
                tile.masked,
                softcap=call.softcap,
                sinks=call.sinks,
                slopes=call.slopes,
                first_key=tile.first_key,
                scratch=self._pool.scores,
            )
            for tile in tiles
        ]
        return torch.cat(parts)[: queries.shape[0]]  # only the last part may be filled up

    def _filled(self, queries: Tensor) -> Tensor:
        """The tile's queries, zeros added up to half a tile or a whole one."""
        count = queries.shape[0]
        missing = (self._tile if 2 * count > self._tile else self._tile // 2) - count
        return pad(queries, (0, 0, 0, 0, 0, missing)) if missing else queries

    def _view(self, window: Window | None) -> tuple[Tensor, int, list[_Tile]]:
        """Under ``window``: the blocks to gather, the number of keys to make of them, and the tiles over these."""
        if window is not None and window.size >= self._stop:
            window = None
        if window not in self._views:
            size = self._pool.block_size
            gathered = first_seen(self._start, window) // size * size
            tiles = []
            for start in range(self._start, self._stop, self._tile):
                first = first_seen(start, window)
                keys = rounded_keys(start + self._tile - first)
                tiles.append(
                    _Tile(
                        slice(start - self._start, min(start + self._tile, self._stop) - self._start),
                        slice(first - gathered, first - gathered + keys),
                        first - start,
                        self._hidden(start, first, keys, window),
                    )
                )
            count = max(tile.keys.stop for tile in tiles)
            self._views[window] = self._blocks[gathered // size :], count, tiles
        return self._views[window]

    def _hidden(self, start: int, first: int, keys: int, window: Window | None) -> Tensor:
        device = self._pool.device
        at = torch.arange(start, start + self._tile, device=device).unsqueeze(1)
        if window is None:
            return torch.arange(start, first + keys, device=device) > at
        key_at = torch.arange(first, first + keys, device=device)
        seen_from = [window.first(position) for position in range(start, start + self._tile)]
        return (key_at > at) | (key_at < torch.tensor(seen_from, device=device).unsqueeze(1))


def rounded_keys(keys: int) -> int:
    """Up to the next of sixteen numbers per power of two, and to a multiple of 64 at least."""
    step = max(64, (1 << keys.bit_length()) // 32)
    return -(-keys // step) * step


@dataclass(frozen=True, slots=True)
class _Shared:
    """Leading blocks common to some sequences, whose attention is computed once for all of them."""

    members: Tensor  # int64, indices into the batch
    blocks: Tensor  # the common ones, as of KVPool.index_of


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences attended over together, each over its own blocks padded to the longest."""

    members: Tensor  # int64, indices into the batch
    blocks: Tensor  # as of KVPool.index_of, sequence after sequence
    visible: Tensor  # bool [members, 1, 1, keys]
    mask: Tensor  # the same as an additive mask in the activations' dtype
    distances: Tensor  # int64 [members, 1, 1, keys], each key's position less the query's


class DecodeStep(AttentionStep):
    """One new token of each sequence, at the end of what its block table covers.

    block_tables: each sequence's block ids. lengths: tokens per sequence, the new one included. min_shared: sequences
    share the computation over common leading blocks if these hold at least so many tokens.
    """

    def __init__(
        self, pool: KVPool, block_tables: list[list[int]], lengths: list[int], *, min_shared: int = 256
    ) -> None:
        self._pool = pool
        self._block_tables = block_tables
        self._lengths = lengths
        self._min_shared = min_shared
        last = [table[(n - 1) // pool.block_size] for table, n in zip(block_tables, lengths, strict=True)]
        offsets = [(n - 1) % pool.block_size for n in lengths]
        pool.clear([block_id for block_id, offset in zip(last, offsets, strict=True) if offset == 0])
        self._written = pool.index_of(last), torch.tensor(offsets, device=pool.device)
        self._layouts: dict[tuple[Window | None, bool], tuple[list[_Shared], list[_Bucket]]] = {}

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self._pool.write(self._pool.kv_layers[call.layer], *self._written, keys, values)
        mergeable = has_partial_kernel(queries.device) and call.softcap is None and call.slopes is None
        shared, buckets = self._layout(call.window, mergeable)
        q = queries.unsqueeze(2)
        if not mergeable:
            return self._attend_masked(call, q, buckets)
        if len(buckets) == 1 and not shared and call.sinks is None:
            return self._attend_bucket(call, q, buckets[0])[0].squeeze(2)
        out = torch.empty_like(q, dtype=torch.float32)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for bucket in buckets:
            out[bucket.members], lse[bucket.members] = self._cast(self._attend_bucket(call, q[bucket.members], bucket))
        for group in shared:
            self._merge_shared(call, q, group, out, lse)
        if call.sinks is not None:
            out = with_sinks((out, lse), call.sinks)
        return out.to(queries.dtype).squeeze(2)

    @staticmethod
    def _cast(partial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return partial[0].float(), partial[1]

    def _attend_bucket(self, call: LayerCall, queries: Tensor, bucket: _Bucket) -> tuple[Tensor, Tensor]:
        keys, values = self._bucket_kv(call, bucket)
        return partial_attention(queries, keys, values, call.scale, bucket.mask)

    def _bucket_kv(self, call: LayerCall, bucket: _Bucket) -> tuple[Tensor, Tensor]:
        keys, values = self._pool.gather(self._pool.kv_layers[call.layer], bucket.blocks)
        count = bucket.members.numel()
        heads, dim = keys.shape[1:]
        return (
            keys.view(count, -1, heads, dim).transpose(1, 2),
            values.view(count, -1, heads, dim).transpose(1, 2),
        )

    def _merge_shared(self, call: LayerCall, q: Tensor, group: _Shared, out: Tensor, lse: Tensor) -> None:
        """The members' queries against the common keys, as one long query axis of a batch of one."""
        keys, values = self._pool.gather(self._pool.kv_layers[call.layer], group.blocks)
        together = q[group.members].squeeze(2).transpose(0, 1).contiguous().unsqueeze(0)
        common, common_lse = partial_attention(
            together, keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0), call.scale
        )
        common, common_lse = common.squeeze(0).transpose(0, 1).unsqueeze(2), common_lse.squeeze(0).t().unsqueeze(2)
        own = (out[group.members], lse[group.members])
        out[group.members] = merge((common, common_lse), own)
        lse[group.members] = torch.logaddexp(common_lse, own[1])

    def _attend_masked(self, call: LayerCall, q: Tensor, buckets: list[_Bucket]) -> Tensor:
        out = torch.empty_like(q)
        for bucket in buckets:
            keys, values = self._bucket_kv(call, bucket)
            out[bucket.members] = masked_attention(
                q[bucket.members],
                keys,
                values,
                call.scale,
                bucket.visible,
                softcap=call.softcap,
                sinks=call.sinks,
                bias=None if call.slopes is None else call.slopes.view(1, -1, 1, 1) * bucket.distances,
            )
        return out.squeeze(2)

    def _layout(self, window: Window | None, mergeable: bool) -> tuple[list[_Shared], list[_Bucket]]:
        key = (window, mergeable)
        if key not in self._layouts:
            self._layouts[key] = self._plan(window, mergeable)
        return self._layouts[key]

    def _plan(self, window: Window | None, mergeable: bool) -> tuple[list[_Shared], list[_Bucket]]:
        size = self._pool.block_size
        first_visible = [first_seen(n - 1, window) for n in self._lengths]
        first_block = [at // size for at in first_visible]
        shared: list[_Shared] = []
        if mergeable and not any(first_visible):
            for members, blocks in shared_prefixes(self._block_tables, self._lengths, size, self._min_shared):
                common = self._pool.index_of(self._block_tables[members[0]][:blocks])
                shared.append(_Shared(self._ids(members), common))
                for member in members:
                    first_block[member] = blocks
        blocks_of = [-(-n // size) - first for n, first in zip(self._lengths, first_block, strict=True)]
        buckets = [self._bucket(members, first_block, first_visible) for members in bucket_by_length(blocks_of)]
        return shared, buckets

    def _bucket(self, members: list[int], first_block: list[int], first_visible: list[int]) -> _Bucket:
        size = self._pool.block_size
        device = self._pool.device
        own = [self._block_tables[m][first_block[m] : -(-self._lengths[m] // size)] for m in members]
        width = max(map(len, own))
        padded = [block_id for block_ids in own for block_id in block_ids + [block_ids[-1]] * (width - len(block_ids))]
        at = torch.arange(width * size, device=device)
        stop = torch.tensor([self._lengths[m] - first_block[m] * size for m in members], device=device)
        start = torch.tensor([first_visible[m] - first_block[m] * size for m in members], device=device)
        visible = (at < stop.unsqueeze(1)) & (at >= start.unsqueeze(1))
        mask = torch.zeros(visible.shape, dtype=self._pool.activations, device=device)
        mask.masked_fill_(~visible, float("-inf"))
        distances = at - (stop - 1).unsqueeze(1)
        blocks = self._pool.index_of(padded)
        members_at = self._ids(members)
        return _Bucket(members_at, blocks, visible[:, None, None], mask[:, None, None], distances[:, None, None])

    def _ids(self, members: list[int]) -> Tensor:
        return torch.tensor(members, device=self._pool.device)


def bucket_by_length(blocks: list[int], *, max_waste: float = 0.5) -> list[list[int]]:
    """Indices grouped so that padding each group to its longest wastes at most ``max_waste`` of the gathered blocks."""
    order = sorted(range(len(blocks)), key=blocks.__getitem__, reverse=True)
    buckets: list[list[int]] = []
    used = 0
    for member in order:
        if buckets:
            padded = blocks[buckets[-1][0]] * (len(buckets[-1]) + 1)
            if padded - used - blocks[member] <= max_waste * padded:
                buckets[-1].append(member)
                used += blocks[member]
                continue
        buckets.append([member])
        used = blocks[member]
    return [sorted(bucket) for bucket in buckets]


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
