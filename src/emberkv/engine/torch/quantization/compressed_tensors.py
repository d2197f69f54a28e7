"""compressed-tensors checkpoints, of llm-compressor: integers packed along the input or one a byte, or FP8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.fp8 import scaled_blocks
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

_SERVED = "int4 and int8 (pack-quantized, int-quantized, naive-quantized) and FP8 (float-quantized) are served"
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


@dataclass(frozen=True, slots=True)
class CompressedTensors(LinearLayers):
    """``scale * (code - zero)``, with signed codes; or FP8 values times a scale.

    packed: weight_packed int32 ``[out, in * bits / 32]`` of codes above their least, zero points packed along the
    output; otherwise ``weight`` has them one by one. weight_scale ``[out, in / group]``, ``[out, 1]`` or ``[1]``. A
    scheme for activations (W8A8) is not followed: they are computed with as for any other source.
    """

    bits: int
    group: int
    symmetric: bool
    packed: bool
    is_float: bool

    parts = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
         "input_scale", "input_zero_point", "output_scale", "output_zero_point"}
    )  # fmt: skip
    keys = frozenset({"weight_scale"})

    @classmethod
    def of_config(cls, settings: Mapping[str, Any]) -> "CompressedTensors":
        """From config.json's ``quantization_config``. Raises UnsupportedModelError."""
        name = "compressed-tensors"
        groups = [each for each in (settings.get("config_groups") or {}).values() if isinstance(each, dict)]
        formats = {str(each.get("format") or settings.get("format")) for each in groups}
        schemes = [each.get("weights") or {} for each in groups]
        if len(formats) != 1 or not formats <= set(_FORMATS):
            raise refuse(name, f"in the format {' and '.join(sorted(formats)) or 'none'}", _SERVED)
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise refuse(name, "and are sparse", "dense weights are served")
        kinds = {
            (each.get("num_bits"), each.get("type"), each.get("symmetric", True), each.get("group_size"))
            for each in schemes
        }
        if len(kinds) != 1:
            raise refuse(name, "with a scheme of its own for some layers", "one scheme for all layers is served")
        bits, kind, symmetric, group = kinds.pop()
        packed = formats == {"pack-quantized"}
        if bits not in ((4, 8) if kind == "int" and packed else (8,)) or kind not in ("int", "float"):
            raise refuse(name, f"as {kind}{bits} in the format {formats.pop()}", _SERVED)
        return cls(int(bits or 0), max(0, int(group or 0)), bool(symmetric), packed, kind == "float")

    @property
    def label(self) -> str:
        kind = "FP8" if self.is_float else f"{self.bits} bits"
        return f"compressed-tensors, {kind}" + (f" in groups of {self.group}" if self.group else "")

    @property
    def held(self) -> str:
        return "16 bits, as FP8 values are unequally spaced" if self.is_float else f"{self.bits} bits, value by value"

    @property
    def _codes(self) -> str:
        return "weight_packed" if self.packed else "weight"

    @property
    def _types(self) -> tuple[torch.dtype, ...]:
        if self.packed:
            return WORDS
        return (torch.float8_e4m3fn,) if self.is_float else (torch.int8,)

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        out_features, stored = shapes[self._codes]
        return out_features, stored * (32 // self.bits if self.packed else 1)

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        if self.is_float:
            return 2 * out_features * in_features
        return affine_bytes(
            out_features, in_features, bits=self.bits, group=self.group, has_offsets=not self.symmetric, packed=packed
        )

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> StoredWeight | Tensor:
        codes, scales = (
            required(layer, stored, self._codes, *self._types),
            required(layer, stored, "weight_scale").float(),
        )
        if self.is_float:
            return scaled_blocks(layer, codes, scales)
        if "weight_g_idx" in stored:
            raise refuse("compressed-tensors", f"with act-order in {layer}", "weights without weight_g_idx are served")
        if self.packed:
            codes = unpack(codes, self.bits, dim=1) - 2 ** (self.bits - 1)
        scales = scales.reshape(scales.shape[0], -1).expand(codes.shape[0], -1)
        if codes.shape[1] % scales.shape[1]:
            raise CorruptModelError(
                f"{layer} has {codes.shape[1]} inputs, which {scales.shape[1]} scales do not divide"
            )
        zeros = None if self.symmetric else self._zeros(required(layer, stored, "weight_zero_point"), scales)
        return StoredWeight(from_signed(codes, scales, None if zeros is None else -scales * zeros, self.bits))

    def _zeros(self, zeros: Tensor, scales: Tensor) -> Tensor:
        if self.packed:
            zeros = unpack(zeros, self.bits, dim=0)[: scales.shape[0]] - 2 ** (self.bits - 1)
        return zeros.float().reshape(zeros.shape[0], -1).expand_as(scales)
