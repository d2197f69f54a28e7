"""Layers over quantised weights that are no plain linear layers: embeddings, and act-order's sorted inputs."""

import torch
from torch import Tensor, nn

from emberkv.engine.torch.layers import stand_in
from emberkv.engine.torch.quantization.linear import QuantizedLinear
from emberkv.engine.torch.quantization.weight import QuantizedWeight, unpack_nibbles


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
