"""Linear layers with weights laid out once for oneDNN.

Called the plain way, oneDNN rearranges a bf16 weight on every call, which for a few rows costs as much as the product
itself.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` for CPU whose weight is kept in oneDNN's own blocked layout.

    weight: ``[out_features, in_features]``, opaque to everything but oneDNN; the plain copy is not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.numel() == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return outputs


def can_pack(linear: nn.Linear) -> bool:
    """Whether oneDNN takes this layer: on CPU, in bf16, with hardware support for it."""
    return (
        linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer that can be packed, except those whose weight something else uses too.

    A tied output layer shares its weight with the embedding, which needs the plain layout. Returns the number of
    layers replaced.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_pack(child) and uses[id(child.weight)] == 1:
                setattr(parent, name, PackedLinear(child))
                replaced += 1
    return replaced
