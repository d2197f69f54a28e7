"""Layers over quantised weights, computed by torch: what a loader puts into a model before the kernels take over."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from emberkv.engine.torch.quantization.weight import QuantizedWeight, unpack_nibbles


class QuantizedLinear(nn.Module):
    """A frozen linear layer over a quantised weight, dequantised in each call.

    It is right and slow: the reference for the kernels, and what computes where they do not.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantised = weight
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, dequantised now."""
        return self.quantised.dequantised(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)


class ReorderedLinear(nn.Module):
    """A linear layer whose columns multiply the inputs in another order than they come (GPTQ's act-order)."""

    def __init__(self, layer: QuantizedLinear, order: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.layer = layer
        self.register_buffer("order", order, persistent=False)
        self.order: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        reordered: Tensor = self.layer(inputs.index_select(-1, self.order))
        return reordered


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are dequantised as they are looked up. factor: what they are multiplied by."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        self.quantised = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.factor = factor

    @property
    def weight(self) -> Tensor:
        """``[vocab, hidden]``, dequantised now."""
        return self.quantised.dequantised(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        whole, rows = self.quantised, tokens.reshape(-1)
        codes = whole.codes[rows] if whole.bits == 8 else unpack_nibbles(whole.codes[rows])
        values = codes.float().view(len(rows), -1, whole.group) * whole.scales[rows][..., None]
        if whole.offsets is not None:
            values += whole.offsets[rows][..., None]
        embedded = values.view(*tokens.shape, self.embedding_dim).to(self.dtype)
        return embedded if self.factor == 1.0 else embedded * self.factor
