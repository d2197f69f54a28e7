"""Multi-head latent attention (MLA, DeepSeek V2) with the compressed latent as the KV.

A token's keys and values of all heads are products of one latent vector, beside which there is one rotated key for all
heads. Both are what is stored, as one KV head: the key is ``[latent, rotated]`` and the value is the latent, padded to
the same width. Queries are multiplied by what would have made keys of the latent, and outputs by what makes values.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from emberkv.engine.torch.quantization.layers import QuantizedLinear


class LatentProjection(Protocol):
    """What goes from heads to latents and back. rank: values of a latent."""

    rank: int
    nope: int  # of a head's query and key, those that are not rotated

    def queries(self, heads: Tensor) -> Tensor:
        """``[heads, tokens, nope]``, a part of rows of any width, to ``[heads, tokens, rank]``."""
        ...

    def outputs(self, latents: Tensor) -> Tensor:
        """``[tokens, heads, rank or more]``, of which the latent comes first, to ``[tokens, heads, values]``."""
        ...


class TorchLatentProjection(nn.Module):
    """By torch. weight: of the layer from latents to keys and values, ``[heads * (nope + values), rank]``."""

    def __init__(self, weight: Tensor, heads: int, nope: int) -> None:
        super().__init__()
        self.rank, self.nope = weight.shape[1], nope
        both = weight.detach().view(heads, -1, self.rank)
        self.to_keys = nn.Parameter(both[:, :nope], requires_grad=False)  # [heads, nope, rank]
        self.to_values = nn.Parameter(both[:, nope:], requires_grad=False)  # [heads, values, rank]

    def queries(self, heads: Tensor) -> Tensor:
        return heads @ self.to_keys

    def outputs(self, latents: Tensor) -> Tensor:
        return (latents[..., : self.rank].transpose(0, 1) @ self.to_values.transpose(1, 2)).transpose(0, 1)


def use_latents(model: nn.Module) -> int:
    """Have all MLA layers hand latents to their attention function. Returns the number of such layers.

    The attention function must call `into_latents` and `out_of_latents`.
    """
    count = 0
    for module in model.modules():
        layer: Any = module
        if callable(getattr(module, "expand_kv", None)) and hasattr(module, "kv_b_proj"):
            weight = _weight_of(layer.kv_b_proj)
            layer.latent = TorchLatentProjection(weight, layer.num_heads, layer.qk_nope_head_dim)
            layer.kv_b_proj = nn.Identity()  # its weight is needed no more
            vars(layer)["expand_kv"] = _as_one_head
            count += 1
    return count


def _weight_of(layer: Any) -> Tensor:
    if isinstance(layer, QuantizedLinear):
        return layer.quantized.dequantised().to(layer.dtype)
    weight: Tensor = layer.weight
    return weight


def _as_one_head(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value ``[batch, 1, tokens, rank + rotated]`` for latents and rotated keys ``[batch, 1, tokens, ...]``."""
    return torch.cat([latent, rotated], dim=-1), pad(latent, (0, rotated.shape[-1]))


def into_latents(module: object, query: Tensor) -> Tensor:
    """``[1, heads, tokens, nope + rotated]`` as ``[1, heads, tokens, rank + rotated]``; any other layer's as it is."""
    latent: LatentProjection | None = getattr(module, "latent", None)
    if latent is None:
        return query
    return torch.cat([latent.queries(query[0, ..., : latent.nope]), query[0, ..., latent.nope :]], dim=-1).unsqueeze(0)


def out_of_latents(module: object, out: Tensor) -> Tensor:
    """``[tokens, heads, rank + rotated]`` as ``[tokens, heads, values]``; any other layer's as it is."""
    latent: LatentProjection | None = getattr(module, "latent", None)
    return out if latent is None else latent.outputs(out)
