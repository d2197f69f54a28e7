"""The methods by which checkpoints are quantised: how each stores its weights, and which one a checkpoint's config.json
names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.stored import (
    WORDS,
    LinearLayers,
    Method,
    StoredWeight,
    affine_bytes,
    from_signed,
    from_unsigned,
    refuse,
    required,
    unpack,
)
from emberkv.engine.torch.quantization.weight import QuantizedWeight
from emberkv.errors import CorruptModelError, UnsupportedModelError

_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class GPTQ(LinearLayers):
    """AutoGPTQ and GPTQModel: integers packed along the input, transposed.

    A value is ``scale * (code - zero)``; the stored zero points are one too small in the first version of the format.

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


_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each output of eight lies in its word: outputs 0, 2, 4, 6 are in the low half of the bytes."""


@dataclass(frozen=True, slots=True)
class AWQ(LinearLayers):
    """The gemm layout: integers packed along the output, in an order of their own; ``scale * (code - zero)`` in 4 bits.

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


@dataclass(frozen=True, slots=True)
class FP8(LinearLayers):
    """Values of E4M3 times a scale for a block, an output or the whole tensor (DeepSeek, Qwen and others).

    The values are not equally spaced, so that no integers hold them. They are held in 16 bits, or rounded to 8 or 4
    where that is asked for.

    weight float8_e4m3fn ``[out, in]``; weight_scale_inv or weight_scale: the factor of each block.
    """

    block: tuple[int, ...]

    parts = frozenset({"weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale"})
    keys = frozenset({"weight_scale_inv", "weight_scale"})

    @classmethod
    def of_config(cls, settings: Mapping[str, Any]) -> "FP8":
        """From config.json's ``quantization_config``. Raises UnsupportedModelError."""
        kind = settings.get("fmt", "e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise refuse("FP8", f"of the kind {kind!r}", "e4m3 is served")
        return cls(tuple(settings.get("weight_block_size") or ()))

    @property
    def label(self) -> str:
        return "FP8" + (f" in blocks of {' x '.join(map(str, self.block))}" if self.block else "")

    @property
    def held(self) -> str:
        return "16 bits, as FP8 values are unequally spaced"

    def shape(self, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes["weight"]

    def num_bytes(self, out_features: int, in_features: int, *, packed: bool = False) -> int:
        return 2 * out_features * in_features

    def read(self, layer: str, stored: Mapping[str, Tensor]) -> Tensor:
        scales = stored["weight_scale_inv"] if "weight_scale_inv" in stored else required(layer, stored, "weight_scale")
        return scaled_blocks(layer, required(layer, stored, "weight", torch.float8_e4m3fn), scales.float(), self.block)


def scaled_blocks(name: str, weight: Tensor, scales: Tensor, block: tuple[int, ...] = ()) -> Tensor:
    """float32 ``[out, in]``: each value times its block's scale. scales: ``[]``, ``[1]``, ``[out, 1]`` or by block.

    block: outputs and inputs of a block, of which the last ones may be smaller; (): the scales divide it evenly.

    Raises CorruptModelError where the scales do not cover the weight.
    """
    values = weight.float()
    if scales.numel() == 1:
        return values * scales.reshape(())
    rows, columns = values.shape
    grid = scales.reshape(scales.shape[0], -1)
    high, wide = block or (-(-rows // grid.shape[0]), -(-columns // grid.shape[1]))
    if grid.shape != (-(-rows // high), -(-columns // wide)):
        raise CorruptModelError(
            f"{name} has scales of shape {list(scales.shape)} for a weight of {rows} x {columns} in blocks of "
            f"{high} x {wide}"
        )
    factors = grid.repeat_interleave(high, dim=0)[:rows].repeat_interleave(wide, dim=1)[:, :columns]
    return values * factors.to(torch.float32)


_SERVED = "int4 and int8 (pack-quantized, int-quantized, naive-quantized) and FP8 (float-quantized) are served"
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


@dataclass(frozen=True, slots=True)
class CompressedTensors(LinearLayers):
    """llm-compressor: integers packed along the input or one a byte, with signed codes, or FP8.

    A value is ``scale * (code - zero)``, or the FP8 value times a scale.

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


@dataclass(frozen=True, slots=True)
class MLX(LinearLayers):
    """Integers packed along the input, with scale and bias a group, the embedding too: ``scale * code + bias``.

    bits, group: of all layers but those in ``own``, which have other ones by name.

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


_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitude of each code; with the sign bit they are sixteen whole numbers, which 8 bits hold exactly."""

GROUP = 32


@dataclass(frozen=True, slots=True)
class MXFP4:
    """The experts of gpt-oss: values of E2M1 in groups of 32 with a power of two as their scale.

    ``NAME_blocks`` uint8 ``[experts, out, groups, 16]``, ``NAME_scales`` ``[experts, out,
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


SERVED = "GPTQ, AWQ, compressed-tensors, FP8, MXFP4, MLX and GGUF"


def _auto_round(settings: Mapping[str, Any]) -> Method:
    packing = str(settings.get("packing_format", "auto_round:auto_gptq"))
    return AWQ.of_config(settings) if "awq" in packing else GPTQ.of_config(settings)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Method]] = {
    "gptq": GPTQ.of_config,
    "awq": AWQ.of_config,
    "auto-round": _auto_round,
    "compressed-tensors": CompressedTensors.of_config,
    "fp8": FP8.of_config,
    "fbgemm_fp8": FP8.of_config,
    "mxfp4": lambda _: MXFP4(),
}
"""By ``quant_method`` in ``quantization_config``."""


def find_method(config: Mapping[str, Any]) -> Method | None:
    """The method of a checkpoint with this config.json; None: its weights are plain.

    Raises UnsupportedModelError naming the method where its weights are not read.
    """
    if isinstance(config.get("quantization"), Mapping):
        return MLX.of_config(config["quantization"])
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    name = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "an unnamed method"))
    if name not in _METHODS:
        raise UnsupportedModelError(
            f"its weights are quantised by {name}, which is not read; {SERVED} are, and the model's plain weights, "
            "which --quantize int8 or int4 rounds while it loads them"
        )
    return _METHODS[name](settings)
