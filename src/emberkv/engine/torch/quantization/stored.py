"""What a quantised checkpoint stores for a linear layer, and how its integers are unpacked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.weight import QuantizedWeight, kernel_group, pack_nibbles
from emberkv.errors import CorruptModelError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A linear layer's weight as it was read.

    order: int64 ``[in]``, which input each column of ``weight`` multiplies, where the checkpoint sorted them
    (act-order); None: its own.
    """

    weight: QuantizedWeight
    order: Tensor | None = None

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out, in]``, with the columns in the order of the inputs."""
        values = self.weight.dequantised(dtype)
        if self.order is None:
            return values
        restored = torch.empty_like(values)
        restored[:, self.order] = values
        return restored


class Method(Protocol):
    """How a checkpoint stores its quantised weights.

    label: for people, such as "GPTQ, 4 bits in groups of 128". held: in what they are computed with, and what that
    changes. keys: parts of which each quantised weight has one.
    """

    @property
    def label(self) -> str: ...

    @property
    def held(self) -> str: ...

    @property
    def keys(self) -> frozenset[str]: ...

    def split(self, name: str) -> tuple[str, str] | None:
        """The layer and the part that a stored tensor of that name is, if layers that are quantised have such parts."""
        ...

    def parameter(self, layer: str) -> str:
        """The name of the parameter that a layer's parts make up."""
        ...

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """``(out, in)`` of the layer, whose stored tensors have these shapes, by part."""
        ...

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        """What a weight takes in memory once it is read. packed: once the kernels have arranged it."""
        ...

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> StoredWeight | Tensor | list[QuantizedWeight]:
        """The weight of the layer from its stored tensors, by part, or those of all experts; a plain one is float32.

        Raises CorruptModelError and UnsupportedModelError naming the layer.
        """
        ...


class LinearLayers:
    """The part of a `Method` that those have in common whose tensors are called ``LAYER.PART``, for a PART of parts."""

    parts: frozenset[str]

    def split(self, name: str) -> tuple[str, str] | None:
        layer, _, part = name.rpartition(".")
        return (layer, part) if part in self.parts else None

    def parameter(self, layer: str) -> str:
        return f"{layer}.weight"


WORDS = (torch.int32, torch.uint32)
"""In what packed integers are stored."""


def unpack(packed: Tensor, bits: int, *, dim: int) -> Tensor:
    """int16: the unsigned integers that lie in 32-bit words along ``dim`` of a matrix, the lowest bits first."""
    per_word = 32 // bits
    words = packed.view(torch.int32).movedim(dim, -1).contiguous()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.int16)
    flat: Tensor = values.view(*words.shape[:-1], words.shape[-1] * per_word)
    return flat.movedim(-1, dim)


def from_unsigned(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> QuantizedWeight:
    """A weight of ``scale * (code - zero)``, from unsigned ``codes`` ``[out, in]`` of 2, 4 or 8 bits.

    scales, zeros: ``[out, in / group]``; no zeros: half of the codes' range. 2 bits are held in 4.

    Raises CorruptModelError where the shapes do not fit together.
    """
    if (zeros is not None and zeros.shape != scales.shape) or not _fit(codes, scales):
        zero_points = "" if zeros is None else f", zero points of {list(zeros.shape)}"
        raise CorruptModelError(
            f"codes of shape {list(codes.shape)}, scales of {list(scales.shape)}{zero_points} do not fit together"
        )
    middle = 2 ** (bits - 1)
    zeros = None if zeros is None or bool((zeros == middle).all()) else zeros.float()
    scales = scales.float().contiguous()
    offsets = None if zeros is None else scales * (middle - zeros)
    return from_signed(codes - middle, scales, offsets, bits)


def _fit(codes: Tensor, scales: Tensor) -> bool:
    groups = scales.shape[1] if scales.ndim == 2 else 0
    return groups > 0 and codes.shape[0] == scales.shape[0] and codes.shape[1] % groups == 0


def from_signed(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> QuantizedWeight:
    """A weight of ``scale * code + offset``, from signed ``codes`` ``[out, in]``."""
    held = codes.to(torch.int8).contiguous() if bits == 8 else pack_nibbles(codes.to(torch.int8))
    group = codes.shape[1] // scales.shape[1]
    own = None if offsets is None else offsets.float().contiguous()
    return QuantizedWeight(held, scales.float().contiguous(), own, group, 8 if bits == 8 else 4)


def affine_bytes(
    out_features: int, in_features: int, *, bits: int, group: int, has_offsets: bool, packed: bool = False
) -> int:
    """Bytes of codes, scales and offsets of such a weight. group: 0 or less: one for a whole output.

    packed: as the kernels hold it: scales and offsets of 16 bits, and a factor of 32 bits for each output.
    """
    group = group if group > 0 else in_features
    size, factor = (2, 4) if packed else (4, 0)
    if packed:
        group = kernel_group(group)
    return out_features * (in_features * max(bits, 4) // 8 + in_features // group * size * (1 + has_offsets) + factor)


def required(name: str, stored: Mapping[str, Tensor], part: str, *types: torch.dtype) -> Tensor:
    """Raises CorruptModelError where a layer lacks a tensor, or has it in none of ``types``; no types: in any."""
    if part not in stored:
        raise CorruptModelError(f"the layer {name} has {', '.join(sorted(stored))}, but no {part}")
    found = stored[part]
    if types and found.dtype not in types:
        raise CorruptModelError(
            f"the layer {name} has its {part} in {found.dtype}; it must be {' or '.join(map(str, types))}"
        )
    return found


def refuse(method: str, reason: str, would_work: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"its weights are quantised by {method}, {reason}; {would_work}")
