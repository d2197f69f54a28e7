"""Linear layers with weights laid out once for oneDNN, whose result for a row does not depend on the other rows.

Called the plain way, oneDNN rearranges a bf16 weight on every call, which for a few rows costs as much as the product
itself, and fp32 products go to a library that picks its kernel, and with it the order of summation, by the number of
rows.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """A frozen linear layer for CPU whose weight is kept in oneDNN's own blocked layout.

    weight: ``[out_features, in_features]``; the plain copy is not kept.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return inputs.new_empty(*inputs.shape[:-1], self.out_features)
        if rows.shape[0] == 1:
            # A single row takes another kernel, which sums in another order.
            return self._product(rows.expand(2, -1))[:1].view(*inputs.shape[:-1], -1)
        return self._product(rows).view(*inputs.shape[:-1], -1)

    def _product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer that oneDNN takes, except those whose weight something else uses too.

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
            if isinstance(child, (nn.Linear, Conv1D)) and uses[id(child.weight)] == 1 and _can_pack(child.weight):
                weight = child.weight if isinstance(child, nn.Linear) else child.weight.t()
                setattr(parent, name, PackedLinear(weight, child.bias))
                replaced += 1
    return replaced


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(bf16)
