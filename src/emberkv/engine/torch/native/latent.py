"""The products of multi-head latent attention by the compiled kernels: a layer a head, all heads in one call."""

from typing import Any

import torch
from torch import Tensor, nn

from emberkv.engine.torch.model.latent import TorchLatentProjection
from emberkv.engine.torch.native.kernels import Kernels, LinearCall, type_number
from emberkv.engine.torch.native.layers import NativeLinear, takes


class NativeLatentProjection(nn.Module):
    """See `LatentProjection`."""

    def __init__(self, kernels: Kernels, plain: TorchLatentProjection) -> None:
        super().__init__()
        self.rank, self.nope = plain.rank, plain.nope
        to_keys = [NativeLinear(kernels, each.t(), None) for each in plain.to_keys]
        to_values = [NativeLinear(kernels, each, None) for each in plain.to_values]
        self._layers = to_keys, to_values  # not registered as modules: none of them is called by itself
        self._kernels = kernels
        self._to_keys, self._to_values = (
            (LinearCall * len(some))(*(each.call for each in some)) for some in self._layers
        )

    def queries(self, heads: Tensor) -> Tensor:
        return self._product(self._to_keys, heads)

    def outputs(self, latents: Tensor) -> Tensor:
        return self._product(self._to_values, latents[..., : self.rank].transpose(0, 1)).transpose(0, 1)

    def _product(self, calls: Any, inputs: Tensor) -> Tensor:
        """``[heads, tokens, inputs]``, whose last axis is dense, to ``[heads, tokens, outputs]``."""
        rows = inputs.shape[1]
        out = torch.empty(len(calls), rows, calls[0].out_features, dtype=inputs.dtype)
        kind, element = type_number(inputs), inputs.element_size()
        for head, call in enumerate(calls):
            call.inputs = inputs.data_ptr() + head * inputs.stride(0) * element
            call.out = out.data_ptr() + head * out.stride(0) * element
            call.input_row, call.rows, call.type = inputs.stride(1), rows, kind
        self._kernels.linears(calls)
        return out


@torch.inference_mode()
def replace_latents(model: nn.Module, kernels: Kernels) -> int:
    """Put the kernels in the place of all projections from and to latents. Returns the number replaced."""
    replaced = 0
    for module in list(model.modules()):
        plain: Any = getattr(module, "latent", None)
        if isinstance(plain, TorchLatentProjection) and takes(plain.to_values) and plain.nope % 2 == 0:
            module.latent = NativeLatentProjection(kernels, plain)
            replaced += 1
    return replaced
