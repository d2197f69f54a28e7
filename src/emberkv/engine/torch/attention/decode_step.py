"""Attention of a decode batch: each sequence over its own blocks, and once for all over blocks they share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from emberkv.engine.torch.attention.attention_math import has_partial_kernel, masked_attention, merge, partial_attention
from emberkv.engine.torch.attention.kv_pool import KVPool
from emberkv.engine.torch.attention.paged_attention import AttentionStep, LayerCall
from emberkv.engine.torch.attention.runs import shared_prefixes


@dataclass(frozen=True, slots=True)
class _Shared:
    """Leading blocks common to some sequences, whose attention is computed once for all of them."""

    members: Tensor  # int64, indices into the batch
    index: Tensor  # gather_index of the common blocks


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences attended over together, each over its own blocks padded to the longest."""

    members: Tensor  # int64, indices into the batch
    index: Tensor  # gather_index, sequence after sequence
    visible: Tensor  # bool [members, 1, 1, keys]
    bias: Tensor  # the same as an additive mask in the pool's dtype


class DecodeStep(AttentionStep):
    """One new token of each sequence, at the end of what its block table covers.

    tables: each sequence's slots. lengths: tokens per sequence, the new one included. min_shared: sequences share the
    computation over common leading blocks if these hold at least so many tokens.
    """

    def __init__(self, pool: KVPool, tables: list[list[int]], lengths: list[int], *, min_shared: int = 256) -> None:
        self._pool = pool
        self._tables = tables
        self._lengths = lengths
        self._min_shared = min_shared
        last = [table[(n - 1) // pool.block_size] for table, n in zip(tables, lengths, strict=True)]
        offsets = [(n - 1) % pool.block_size for n in lengths]
        pool.clear([block_id for block_id, offset in zip(last, offsets, strict=True) if offset == 0])
        self._write = pool.write_index(pool.rows(last), torch.tensor(offsets, device=pool.device))
        self._layouts: dict[tuple[int | None, bool], tuple[list[_Shared], list[_Bucket]]] = {}

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self._pool.write(self._write[call.layer], keys, values)
        mergeable = has_partial_kernel(queries.device) and call.softcap is None
        shared, buckets = self._layout(call.window, mergeable)
        q = queries.unsqueeze(2)
        if not mergeable:
            return self._attend_masked(call, q, buckets)
        if len(buckets) == 1 and not shared:
            return self._attend_bucket(call, q, buckets[0])[0].squeeze(2)
        out = torch.empty_like(q, dtype=torch.float32)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for bucket in buckets:
            out[bucket.members], lse[bucket.members] = self._cast(self._attend_bucket(call, q[bucket.members], bucket))
        for group in shared:
            self._merge_shared(call, q, group, out, lse)
        return out.to(queries.dtype).squeeze(2)

    @staticmethod
    def _cast(partial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return partial[0].float(), partial[1]

    def _attend_bucket(self, call: LayerCall, queries: Tensor, bucket: _Bucket) -> tuple[Tensor, Tensor]:
        keys, values = self._bucket_kv(call, bucket)
        return partial_attention(queries, keys, values, call.scale, bucket.bias)

    def _bucket_kv(self, call: LayerCall, bucket: _Bucket) -> tuple[Tensor, Tensor]:
        keys, values = self._pool.gather(bucket.index[call.layer])
        count = bucket.members.numel()
        heads, dim = keys.shape[1:]
        return (
            keys.view(count, -1, heads, dim).transpose(1, 2),
            values.view(count, -1, heads, dim).transpose(1, 2),
        )

    def _merge_shared(self, call: LayerCall, q: Tensor, group: _Shared, out: Tensor, lse: Tensor) -> None:
        """The members' queries against the common keys, as one long query axis of a batch of one."""
        keys, values = self._pool.gather(group.index[call.layer])
        together = q[group.members].squeeze(2).transpose(0, 1).contiguous().unsqueeze(0)
        common, common_lse = partial_attention(
            together, keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0), call.scale
        )
        common, common_lse = common.squeeze(0).transpose(0, 1).unsqueeze(2), common_lse.squeeze(0).t().unsqueeze(2)
        own = (out[group.members], lse[group.members])
        out[group.members] = merge((common, common_lse), own)

    def _attend_masked(self, call: LayerCall, q: Tensor, buckets: list[_Bucket]) -> Tensor:
        out = torch.empty_like(q)
        for bucket in buckets:
            keys, values = self._bucket_kv(call, bucket)
            out[bucket.members] = masked_attention(
                q[bucket.members], keys, values, call.scale, bucket.visible, call.softcap
            )
        return out.squeeze(2)

    def _layout(self, window: int | None, mergeable: bool) -> tuple[list[_Shared], list[_Bucket]]:
        key = (window, mergeable)
        if key not in self._layouts:
            self._layouts[key] = self._plan(window, mergeable)
        return self._layouts[key]

    def _plan(self, window: int | None, mergeable: bool) -> tuple[list[_Shared], list[_Bucket]]:
        size = self._pool.block_size
        first_visible = [0 if window is None else max(0, n - window) for n in self._lengths]
        first_block = [at // size for at in first_visible]
        shared: list[_Shared] = []
        if mergeable and not any(first_visible):
            for members, blocks in shared_prefixes(self._tables, self._lengths, size, self._min_shared):
                rows = self._pool.rows(self._tables[members[0]][:blocks])
                shared.append(_Shared(self._ids(members), self._pool.gather_index(rows)))
                for member in members:
                    first_block[member] = blocks
        blocks_of = [-(-n // size) - first for n, first in zip(self._lengths, first_block, strict=True)]
        buckets = [self._bucket(members, first_block, first_visible) for members in bucket_by_length(blocks_of)]
        return shared, buckets

    def _bucket(self, members: list[int], first_block: list[int], first_visible: list[int]) -> _Bucket:
        size = self._pool.block_size
        device = self._pool.device
        own = [self._tables[m][first_block[m] : -(-self._lengths[m] // size)] for m in members]
        width = max(map(len, own))
        padded = [block_id for block_ids in own for block_id in block_ids + [block_ids[-1]] * (width - len(block_ids))]
        at = torch.arange(width * size, device=device)
        stop = torch.tensor([self._lengths[m] - first_block[m] * size for m in members], device=device)
        start = torch.tensor([first_visible[m] - first_block[m] * size for m in members], device=device)
        visible = (at < stop.unsqueeze(1)) & (at >= start.unsqueeze(1))
        bias = torch.zeros(visible.shape, dtype=self._pool.dtype, device=device)
        bias.masked_fill_(~visible, float("-inf"))
        index = self._pool.gather_index(self._pool.rows(padded))
        return _Bucket(self._ids(members), index, visible[:, None, None], bias[:, None, None])

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
