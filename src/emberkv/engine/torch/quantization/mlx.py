"""MLX folders: integers packed along the input, with scale and bias a group; the embedding, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from emberkv.engine.torch.quantization.stored import (
    WORDS,
    LinearLayers,
    StoredWeight,
    affine_bytes,
    from_signed,
    refuse,
    required,
    unpack,
)
from emberkv.errors import CorruptModelError


@dataclass(frozen=True, slots=True)
class MLX(LinearLayers):
    """``scale * code + bias``. bits, group: of all layers but those in ``own``, which have other ones by name.

    weight uint32 ``[out, in * bits / 32]``, scales and biases ``[out, in / group]``.
    """

    bits: int
    group: int
    own: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    parts = frozenset({"weight", "scales", "biases"})
    keys = frozenset({"scales"})

    @classmethod
    def of_config(cls, settings: Mapping[str, Any]) -> "MLX":
        """From config.json's ``quantization``. Raises UnsupportedModelError."""
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise refuse("MLX", f"in its mode {mode!r}", "the mode affine is served, in 4 and 8 bits")
        bits, group = int(settings.get("bits", 4)), int(settings.get("group_size", 64))
        own = {
            name: (int(each.get("bits", bits)), int(each.get("group_size", group)))
            for name, each in settings.items()
            if isinstance(each, dict)
        }
        odd = sorted({each for each, _ in [(bits, group), *own.values()]} - {4, 8})
        if odd:
            raise refuse("MLX", f"in {odd[0]} bits", "4 and 8 bits are served")
        return cls(bits, group, own)

    @property
    def label(self) -> str:
        return f"MLX, {self.bits} bits in groups of {self.group}"

    @property
    def held(self) -> str:
        return f"{self.bits} bits, value by value"

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        *experts, out_features, packed = shapes["weight"]
        return *experts, out_features, packed * 32 // self._bits(layer)

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        return affine_bytes(
            out_features, in_features, bits=self.bits, group=self.group, has_offsets=True, packed=packed
        )

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> StoredWeight:
        packed, scales = required(layer, stored, "weight", *WORDS), required(layer, stored, "scales").float()
        bits = self._bits(layer)
        middle = 2 ** (bits - 1)
        codes = unpack(packed, bits, dim=1) - middle
        if codes.shape[1] % scales.shape[1]:
            raise CorruptModelError(
                f"{layer} has {codes.shape[1]} inputs, which {scales.shape[1]} scales do not divide"
            )
        biases = required(layer, stored, "biases").float() + middle * scales
        return StoredWeight(from_signed(codes, scales, biases, bits))

    def _bits(self, name: str) -> int:
        return self.own.get(name, (self.bits, self.group))[0]
