"""MXFP4 (gpt-oss): values of E2M1 in groups of 32 with a power of two as their scale."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.stored import affine_bytes, required
from emberkv.engine.torch.quantization.weight import QuantizedWeight

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitude of each code; with the sign bit they are sixteen whole numbers, which 8 bits hold exactly."""

GROUP = 32


@dataclass(frozen=True, slots=True)
class MXFP4:
    """The experts of gpt-oss: ``NAME_blocks`` uint8 ``[experts, out, groups, 16]``, ``NAME_scales`` ``[experts, out,
    groups]``, for a parameter ``NAME`` of ``[experts, in, out]``.
    """

    label = "MXFP4 experts"
    held = "8 bits, value by value"
    keys = frozenset({"blocks"})

    def split(self, name: str) -> tuple[str, str] | None:
        layer, _, part = name.rpartition("_")
        return (layer, part) if part in ("blocks", "scales") else None

    def parameter(self, layer: str) -> str:
        return layer

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        experts, out_features, groups, _ = shapes["blocks"]
        return experts, groups * GROUP, out_features

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        return affine_bytes(out_features, in_features, bits=8, group=GROUP, has_offsets=False, packed=packed)

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> list[QuantizedWeight]:
        blocks, scales = (required(layer, stored, part, torch.uint8) for part in ("blocks", "scales"))
        return [read_mxfp4(*each) for each in zip(blocks, scales, strict=True)]


def read_mxfp4(blocks: Tensor, scales: Tensor) -> QuantizedWeight:
    """The weight of one matrix.

    blocks: uint8 ``[out, groups, 16]``, the low half of a byte is the even input. scales: uint8 ``[out, groups]``, the
    exponent of two plus 127.
    """
    table = torch.tensor([*_TWICE, *(-each for each in _TWICE)], dtype=torch.int8)
    codes = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    factors = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 128)
    return QuantizedWeight(codes.reshape(blocks.shape[0], -1).contiguous(), factors, None, GROUP, 8)
