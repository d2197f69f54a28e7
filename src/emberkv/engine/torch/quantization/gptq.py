"""GPTQ checkpoints, of AutoGPTQ and GPTQModel: integers packed along the input, transposed."""

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
from emberkv.errors import CorruptModelError

_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class GPTQ(LinearLayers):
    """``scale * (code - zero)``; the stored zero points are one too small in the first version of the format.

    group: inputs that share a scale; 0: all. zeros_less_one: whether it is the first version.

    qweight int32 ``[in * bits / 32, out]``, qzeros int32 ``[groups, out * bits / 32]``, scales ``[groups, out]``,
    g_idx int32 ``[in]``: the group of each input. With act-order (desc_act) the inputs of a group lie scattered. They
    are brought together here, and `StoredWeight.order` says how.
    """

    bits: int
    group: int
    symmetric: bool
    zeros_less_one: bool

    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    keys = frozenset({"qweight"})

    @classmethod
    def of_config(cls, settings: Mapping[str, Any]) -> "GPTQ":
        """From config.json's ``quantization_config``. Raises UnsupportedModelError."""
        bits = settings.get("bits")
        if bits not in _BITS:
            raise refuse("GPTQ", f"in {bits} bits", "2, 4 and 8 bits are served")
        if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            raise refuse(
                "GPTQ", f"in the layout {settings['checkpoint_format']!r}", "the layouts gptq and gptq_v2 are served"
            )
        group = int(settings.get("group_size") or 0)
        first = settings.get("checkpoint_format", "gptq") == "gptq"
        return cls(int(bits), max(0, group), bool(settings.get("sym", True)), first)

    @property
    def label(self) -> str:
        return f"GPTQ, {self.bits} bits in groups of {self.group or 'a whole row'}"

    @property
    def held(self) -> str:
        return f"{max(4, self.bits)} bits, value by value"

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        packed, out_features = shapes["qweight"]
        return out_features, packed * 32 // self.bits

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        return affine_bytes(
            out_features, in_features, bits=self.bits, group=self.group, has_offsets=not self.symmetric, packed=packed
        )

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> StoredWeight:
        codes = unpack(required(layer, stored, "qweight", *WORDS), self.bits, dim=0).t()
        scales = required(layer, stored, "scales").t()
        zeros = unpack(required(layer, stored, "qzeros", *WORDS), self.bits, dim=1).t()[: codes.shape[0]]
        if self.zeros_less_one:
            zeros = (zeros + 1) & (2**self.bits - 1)
        order = _order(layer, stored.get("g_idx"), codes.shape[1], scales.shape[1])
        if order is not None:
            codes = codes[:, order]
        return StoredWeight(from_unsigned(codes, scales, zeros, self.bits), order)


def _order(name: str, group_of: Tensor | None, in_features: int, groups: int) -> Tensor | None:
    """The inputs sorted by their group; None where they are. Raises CorruptModelError for groups of unequal size."""
    if group_of is None:
        return None
    size = in_features // groups
    found = group_of.to(torch.int64)
    if torch.equal(found, torch.arange(in_features) // size):
        return None
    order = torch.argsort(found, stable=True)
    if not torch.equal(found[order], torch.arange(in_features) // size):
        raise CorruptModelError(f"g_idx of {name} does not divide its {in_features} inputs into {groups} equal groups")
    return order
