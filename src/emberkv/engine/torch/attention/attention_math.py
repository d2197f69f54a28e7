"""Attention kernels: one sequence's tile over its keys, partial results over some keys, and their merge.

Consecutive query heads share a KV head. They are folded into the query axis of that head, so that keys and values are
never copied per query head.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emberkv.engine.torch.attention.scratch import Scratch

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

SCORES_PER_PASS = 8 * 2**20
"""Scores held at once, as far as whole KV heads allow: 16 MiB in bf16, which a cache of the last level holds."""


def tile_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    hidden: Tensor,
    *,
    softcap: float | None,
    scratch: Scratch,
) -> Tensor:
    """Attention of one tile: queries ``[tokens, heads, dim]``, keys and values ``[kv_heads, keys, dim]``.

    hidden: bool ``[tokens or more, n]``, what a query must not see of the last ``n`` keys; it sees all earlier ones.
    softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).

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
        scores = scratch.take((len(some), groups * tokens, length), queries.dtype)
        # Head by head: a batched product would copy keys that are a slice of a longer sequence's.
        for head, head_scores in zip(some, scores, strict=True):
            torch.mm(folded[head], keys[head].t(), out=head_scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        seen = scores.view(-1, groups, tokens, length)[..., length - hidden.shape[1] :]
        seen.masked_fill_(hidden[:tokens], float("-inf"))
        torch.softmax(scores, dim=-1, out=scores)
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


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor, softcap: float | None
) -> Tensor:
    """Attention under a boolean mask ``[batch, 1, 1, keys]``, on any device; shapes as in `partial_attention`."""
    if softcap is None:
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(queries.dtype) @ values
