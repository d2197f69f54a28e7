"""AWQ checkpoints in the gemm layout: integers packed along the output, in an order of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.stored import (
    WORDS,
    LinearLayers,
    StoredWeight,
    affine_bytes,
    from_unsigned,
    refuse,
    required,
    unpack,
)

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each output of eight lies in its word: outputs 0, 2, 4, 6 are in the low half of the bytes."""


@dataclass(frozen=True, slots=True)
class AWQ(LinearLayers):
    """``scale * (code - zero)`` in 4 bits.

    qweight int32 ``[in, out / 8]``, qzeros int32 ``[groups, out / 8]``, scales ``[groups, out]``.
    """

    group: int

    parts = frozenset({"qweight", "qzeros", "scales"})
    keys = frozenset({"qweight"})

    @classmethod
    def of_config(cls, settings: Mapping[str, Any]) -> "AWQ":
        """From config.json's ``quantization_config``. Raises UnsupportedModelError."""
        bits = settings.get("bits", settings.get("w_bit"))
        if bits != 4:
            raise refuse("AWQ", f"in {bits} bits", "4 bits are served")
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise refuse("AWQ", f"in the layout {version!r}", "the layout gemm is served")
        return cls(max(0, int(settings.get("group_size", settings.get("q_group_size")) or 0)))

    @property
    def label(self) -> str:
        return f"AWQ, 4 bits in groups of {self.group or 'a whole row'}"

    @property
    def held(self) -> str:
        return "4 bits, value by value"

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        in_features, packed = shapes["qweight"]
        return packed * 8, in_features

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        return affine_bytes(out_features, in_features, bits=4, group=self.group, has_offsets=True, packed=packed)

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> StoredWeight:
        codes = _unpacked(required(layer, stored, "qweight", *WORDS))
        scales = required(layer, stored, "scales").t()
        return StoredWeight(from_unsigned(codes, scales, _unpacked(required(layer, stored, "qzeros", *WORDS)), 4))


def _unpacked(packed: Tensor) -> Tensor:
    """int16 ``[out, rows]`` of ``[rows, out / 8]``."""
    values = unpack(packed, 4, dim=1)
    return values.view(values.shape[0], -1, 8)[..., torch.tensor(_ORDER)].reshape(values.shape).t()
