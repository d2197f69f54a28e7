"""Attention kernels: over keys that all queries see, over masked keys, and the merge of partial results.

Shapes: queries ``[batch, heads, queries, head_dim]``, keys and values ``[batch, kv_heads, keys, head_dim]``, where
heads is a multiple of kv_heads and consecutive heads share a KV head. A partial result comes with the log-sum-exp of
its scores, which is all that is needed to merge it with another over disjoint keys.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def has_partial_kernel(device: torch.device) -> bool:
    """Whether `partial_attention` runs on this device."""
    return device.type == "cpu"


def partial_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: output ``[batch, heads, queries, head_dim]`` and its log-sum-exp
    ``[batch, heads, queries]`` (fp32). The heads of a group are folded into the query axis, so keys are never copied
    per head. mask: additive, broadcast over the folded axis.
    """
    batch, heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    folded = queries.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    out, lse = _flash_cpu(folded, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, length, dim), lse.reshape(batch, heads, length)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Like `partial_attention`, for as many keys as queries, each query seeing the keys up to its own."""
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    out, lse = _flash_cpu(queries, keys, values, 0.0, True, scale=scale)
    return out, lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The attention over both key sets, in fp32.

    With out = sum(exp(s) v) / sum(exp(s)) and lse = log(sum(exp(s))), the union's output is the mean of the two
    weighted by exp(lse), and one weight is sigmoid(lse_first - lse_second).
    """
    weight = torch.sigmoid(first[1] - second[1]).unsqueeze(-1)
    return torch.lerp(second[0].float(), first[0].float(), weight)


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor, softcap: float | None = None
) -> Tensor:
    """Attention under a boolean mask ``[batch or 1, 1, queries, keys]``, on any device.

    softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
    """
    if softcap is None:
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(queries.dtype) @ values
