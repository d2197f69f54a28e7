"""Layers with quantised weights, as a model holds them before the kernels take the place of the linear ones."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from emberkv.engine.torch.layers import linear_parts, stand_in
from emberkv.engine.torch.quantization.weight import QuantizedWeight, unpack_nibbles
from emberkv.errors import UnsupportedModelError

_SLICE = 8192
"""Outputs whose weights are dequantised at a time, so that a large vocabulary's are not held in full."""


class QuantizedLinear(nn.Module):
    """``inputs @ weight.T + bias`` in ``dtype``, with a weight that is dequantised anew in each call.

    It is what the kernels are compared with, and what computes without them: as exact as a plain layer with the
    dequantised weight, and slow. ``weight`` has the plain weight's shape and no values.
    """

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self.weight = stand_in(torch.empty((), dtype=dtype, device=quantized.codes.device).expand(quantized.shape))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = (
            linear(inputs, self.quantized.rows(start, start + _SLICE).dequantised(self.dtype))
            for start in range(0, self.out_features, _SLICE)
        )
        product = torch.cat(list(parts), dim=-1)
        return product if self.bias is None else product + self.bias


class ReorderedLinear(nn.Module):
    """A linear layer whose columns multiply the inputs in another order than they come (GPTQ's act-order).

    order: int64 ``[in]``, the input that each column multiplies.
    """

    def __init__(self, layer: QuantizedLinear, order: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.layer = layer
        self.order = order

    def forward(self, inputs: Tensor) -> Tensor:
        reordered: Tensor = self.layer(inputs.index_select(-1, self.order))
        return reordered


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are dequantised as they are looked up, to ``dtype``.

    factor: what they are multiplied by, as Gemma does. ``weight`` has the plain weight's shape and no values.
    """

    def __init__(self, quantized: QuantizedWeight, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        self.quantized = quantized
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.dtype = dtype
        self.factor = factor
        self.weight = stand_in(torch.empty((), dtype=dtype).expand(quantized.shape))

    def forward(self, tokens: Tensor) -> Tensor:
        whole, ids = self.quantized, tokens.reshape(-1)
        codes = whole.codes[ids] if whole.bits == 8 else unpack_nibbles(whole.codes[ids])
        values = codes.float().view(len(ids), -1, whole.group) * whole.scales[ids][..., None]
        if whole.offsets is not None:
            values += whole.offsets[ids][..., None]
        embedded = values.view(*tokens.shape, self.embedding_dim).to(self.dtype)
        return embedded if self.factor == 1.0 else embedded * self.factor


class QuantizedExperts(nn.Module):
    """The weights of a mixture's experts, dequantised one by one as the mixture's own code takes them by their number.

    It stands where a parameter ``[experts, out, in]`` did; transposed: ``[experts, in, out]``.
    """

    def __init__(self, weights: list[QuantizedWeight], dtype: torch.dtype, *, transposed: bool = False) -> None:
        super().__init__()
        self.quantized = weights
        self.dtype = dtype
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.quantized[0].shape
        return (len(self.quantized), columns, rows) if self.transposed else (len(self.quantized), rows, columns)

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        values = self.quantized[int(expert)].dequantised(self.dtype)
        return values.t() if self.transposed else values


def put_experts(module: Any, name: str, weights: list[QuantizedWeight], dtype: torch.dtype) -> None:
    """Put quantised weights in the place of a stacked one, of a module that `is_experts`."""
    module._parameters.pop(name)
    setattr(module, name, QuantizedExperts(weights, dtype, transposed=module.is_transposed))
    module.config._experts_implementation = "eager"  # the others multiply by the whole stack at once


def replace_linears(model: nn.Module, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
    """Put a `QuantizedLinear` in the place of each linear layer that ``weights`` names, such as "lm_head".

    A layer's own weight may be on the meta device; its bias is kept.

    Raises UnsupportedModelError for a name that is no linear layer of the model, and for a weight of another shape.
    """
    for name, quantized in weights.items():
        parent_name, _, own = name.rpartition(".")
        parts = linear_parts(model.get_submodule(name))
        if parts is None:
            raise UnsupportedModelError(
                f"{name} has a quantised weight and is no linear layer of {type(model).__name__}"
            )
        weight, bias = parts
        if tuple(weight.shape) != quantized.shape:
            raise UnsupportedModelError(
                f"{name} has a quantised weight of {list(quantized.shape)}; the config makes it {list(weight.shape)}"
            )
        setattr(model.get_submodule(parent_name), own, QuantizedLinear(quantized, bias, dtype))


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """Those of all linear layers and experts in the model."""
    stacks = [module.quantized for module in model.modules() if isinstance(module, QuantizedExperts)]
    return [*(each.quantized for each in quantized_linears(model)), *chain.from_iterable(stacks)]


def quantized_linears(model: nn.Module) -> list[QuantizedLinear]:
    """All of them in the model."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
