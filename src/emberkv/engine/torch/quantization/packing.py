"""How quantised weights lie in memory for the C++ kernels, and what this loses: native/quantized.hpp draws it."""

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.weight import QuantizedWeight, kernel_group

_SLICE = 4096
"""Outputs that are arranged at a time, so that a large weight is not held several times over."""

_LARGEST_OFFSET = 2.0**15
"""Of offsets in fp16, in units of their output's factor."""


def packed_bytes(weight: QuantizedWeight, columns: int) -> int:
    """Of each ``columns`` outputs."""
    group = kernel_group(weight.group)
    scales = columns * 2 * (1 if weight.offsets is None else 2)
    return columns * 4 + weight.in_features // group * (columns * group * weight.bits // 8 + scales)


@torch.no_grad()
def pack(weight: QuantizedWeight, columns: int) -> Tensor:
    """uint8 ``[groups of outputs, bytes]``, for ``columns`` outputs each, of which those beyond the last are zeros.

    An output's scales and offsets become fp16 beside one factor for all of them, the power of two at or above its
    largest scale: they lose one part in 2048 at most. Those that came from fp16 lose nothing unless those of one output
    differ by more than 2^14. Where an offset is more than 32,768 times that power, the factor is larger.
    """
    weight = weight.with_group(kernel_group(weight.group))
    groups = -(-weight.out_features // columns)
    out = torch.empty(groups, packed_bytes(weight, columns), dtype=torch.uint8)
    step = max(columns, _SLICE // columns * columns)
    for start in range(0, weight.out_features, step):
        part = weight.rows(start, min(start + step, weight.out_features))
        some = _packed(part, columns)
        out[start // columns : start // columns + some.shape[0]] = some
    return out


def _packed(weight: QuantizedWeight, columns: int) -> Tensor:
    largest = weight.scales.abs().amax(dim=1)
    if weight.offsets is not None:
        largest = largest.maximum(weight.offsets.abs().amax(dim=1) / _LARGEST_OFFSET)
    factors = largest.clamp_min(2.0**-126).log2().ceil().exp2().clamp_max(2.0**126)
    codes = _steps(weight)
    parts = [_by_column(codes, columns), _by_column(_halves(weight.scales / factors[:, None]), columns)]
    if weight.offsets is not None:
        parts.append(_by_column(_halves(weight.offsets / factors[:, None]), columns))
    groups = torch.cat([part.flatten(2) for part in parts], dim=2).flatten(1)
    return torch.cat([_filled(factors, columns).view(-1, columns).view(torch.uint8), groups], dim=1)


def _steps(weight: QuantizedWeight) -> Tensor:
    """uint8 ``[out, groups, steps, bytes]``: what lies together of an output."""
    shape = (weight.out_features, weight.in_features // weight.group)
    if weight.bits == 8:
        return weight.codes.view(torch.uint8).view(*shape, -1, 2)
    # A byte of the weight's own holds two neighbours; the kernels want those of even inputs apart from the others.
    pairs = weight.codes.view(*shape, -1, 4)
    even, odd = pairs & 15, pairs >> 4
    halves = [each[..., low] | (each[..., low + 1] << 4) for each in (even, odd) for low in (0, 2)]
    return torch.stack(halves, dim=-1)


def _halves(values: Tensor) -> Tensor:
    """uint8 ``[out, groups, 1, 2]``."""
    return values.half().contiguous().view(torch.uint8).view(*values.shape, 1, 2)


def _by_column(parts: Tensor, columns: int) -> Tensor:
    """``[out, groups, steps, bytes]`` as ``[groups of outputs, groups, steps, columns, bytes]``."""
    filled = _filled(parts, columns)
    return filled.view(-1, columns, *filled.shape[1:]).permute(0, 2, 3, 1, 4)


def _filled(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros added to the first axis, up to the next multiple."""
    missing = -tensor.shape[0] % multiple
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]).contiguous()
