"""The format of quantised weights: integer codes in groups along the input, each with a scale and maybe an offset."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isfinite
from typing import Literal

import torch
from torch import Tensor

from emberkv.errors import ConfigError, UnsupportedModelError

Bits = Literal[4, 8]

GROUPS = (16, 32, 64, 128)
"""Sizes of a group that the kernels compute with, in inputs. A larger one is cut into these."""

DEFAULT_GROUP = 32

DTYPES: dict[Bits, torch.dtype] = {8: torch.int8, 4: vars(torch)["int4"]}  # torch's stubs do not have the second
"""What a model with such weights names as their type."""

_SLICE = 1 << 17
"""Values that are rounded at a time: so few that a search over scales stays in the processor's cache."""

_SAMPLE = 1 << 20
"""Values of a weight that decide, in 4 bits, whether it gets offsets."""

_WIDTHS = (1.0, 0.93, 0.86)
"""Shares of a group's range, from its least to its largest value, over which the search begins with even steps."""

_FITS = 2
"""Times that codes and, by least squares, scale and offset are found anew for each of these."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weight of a linear layer, ``[out, in]``, in integer codes: ``value = scale * code + offset``.

    codes: 8 bits: int8 ``[out, in]``. 4 bits: uint8 ``[out, in / 2]``, two codes of -8 to 7 in a byte, each as
    ``code + 8``; the low half is that of the even input. `pack_nibbles` makes them.
    scales: float32 ``[out, in / group]``. offsets: the same shape, in the unit of the values; None where all are zero.
    group: inputs that share a scale, a multiple of 16.

    What is held without loss beyond the rounding of scale and offset to float32:

    | source | bits | group | codes | scale and offset |
    |---|---|---|---|---|
    | GGUF Q8_0 | 8 | 32 | as stored | d |
    | GGUF Q4_0 | 4 | 32 | q - 8 | d |
    | GGUF Q4_1 | 4 | 32 | q - 8 | d, m + 8 d |
    | GGUF Q2_K | 4 | 16 | q | d sc, - dmin m |
    | GGUF Q3_K | 4 | 16 | q - 4 | d sc |
    | GGUF Q4_K | 4 | 32 | q - 8 | d sc, 8 d sc - dmin m |
    | GGUF Q5_K | 8 | 32 | q - 16 | d sc, 16 d sc - dmin m |
    | GGUF Q6_K | 8 | 16 | q - 32 | d sc |
    | GGUF IQ4_NL, IQ4_XS | 8 | 32 | the table's integer | d, d sc |
    | GPTQ, AWQ and compressed-tensors, 4 bits with zero point z | 4 | as stored | q - 8 | s, s (8 - z) |
    | the same, 8 bits with zero point z | 8 | as stored | q - 128 | s, s (128 - z) |
    | MLX, 4 bits | 4 | as stored | q - 8 | scale, bias + 8 scale |
    | MLX, 8 bits | 8 | as stored | q - 128 | scale, bias + 128 scale |
    | MXFP4 | 8 | 32 | twice the value, -12 to 12 | 2^(e - 1) |

    A scale for a whole output channel is a group of ``in`` inputs. FP8 has no such form: its values are not equally
    spaced, and `quantise` rounds them to 8 bits, at most 1/254 of a group's largest value off.

    Raises UnsupportedModelError for shapes, types or groups that do not fit together.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    group: int
    bits: Bits

    def __post_init__(self) -> None:
        codes, groups = tuple(self.codes.shape), tuple(self.scales.shape)
        kind = torch.int8 if self.bits == 8 else torch.uint8
        if self.codes.dtype is not kind or self.scales.dtype is not torch.float32:
            raise UnsupportedModelError(
                f"a weight of {self.bits} bits has codes of {self.codes.dtype} and scales of {self.scales.dtype}; "
                f"they must be {kind} and torch.float32"
            )
        if self.group % GROUPS[0] or (self.out_features, self.in_features) != (groups[0], groups[1] * self.group):
            raise UnsupportedModelError(
                f"codes of shape {list(codes)} at {self.bits} bits, scales of shape {list(groups)} and groups of "
                f"{self.group} inputs do not fit together; a group must be a multiple of {GROUPS[0]} inputs"
            )
        if self.offsets is not None and (
            self.offsets.shape != self.scales.shape or self.offsets.dtype != torch.float32
        ):
            raise UnsupportedModelError(
                f"offsets of shape {list(self.offsets.shape)} and type {self.offsets.dtype} do not fit scales of shape "
                f"{list(groups)}; they must be of the same shape, in torch.float32"
            )

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * (1 if self.bits == 8 else 2)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, as of the plain weight."""
        return self.out_features, self.in_features

    @property
    def num_bytes(self) -> int:
        """Of codes, scales and offsets, as they are held here."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.offsets) if tensor is not None)

    def signed_codes(self) -> Tensor:
        """int8 ``[out, in]``, from -128 to 127, or from -8 to 7 in 4 bits."""
        return self.codes if self.bits == 8 else unpack_nibbles(self.codes)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out, in]``: ``scale * code + offset``, computed in float32 and then rounded to ``dtype``."""
        values = self.signed_codes().float().view(self.out_features, -1, self.group)
        values.mul_(self.scales[..., None])
        if self.offsets is not None:
            values.add_(self.offsets[..., None])
        return values.view(self.out_features, self.in_features).to(dtype)

    def with_group(self, group: int) -> "QuantizedWeight":
        """The same values in smaller groups, of which each repeats its scale. Raises ConfigError unless they fit."""
        if group == self.group:
            return self
        if self.group % group:
            raise ConfigError(f"groups of {self.group} inputs cannot be cut into groups of {group}")
        times = self.group // group
        offsets = None if self.offsets is None else self.offsets.repeat_interleave(times, dim=1)
        return QuantizedWeight(self.codes, self.scales.repeat_interleave(times, dim=1), offsets, group, self.bits)

    def in_8_bits(self) -> "QuantizedWeight":
        """The same values, whose codes are held in 8 bits."""
        return QuantizedWeight(self.signed_codes(), self.scales, self.offsets, self.group, 8)

    def rows(self, start: int, stop: int, step: int = 1) -> "QuantizedWeight":
        """Of each ``step``-th output from ``start`` to before ``stop``; they share their memory with this one's."""
        some = slice(start, stop, step)
        offsets = None if self.offsets is None else self.offsets[some]
        return QuantizedWeight(self.codes[some], self.scales[some], offsets, self.group, self.bits)

    def fill(self, other: "QuantizedWeight") -> None:
        """Take the values of a weight of the same shape and form. Raises ConfigError where one alone has offsets."""
        if (self.offsets is None) != (other.offsets is None):
            raise ConfigError("only one of two weights has offsets; both must be of one form")
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)
        if self.offsets is not None and other.offsets is not None:
            self.offsets.copy_(other.offsets)

    def reordered(self, rows: Tensor) -> "QuantizedWeight":
        """Its outputs in another order. rows: int64 ``[out]``, the output that comes in each place."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return QuantizedWeight(self.codes[rows], self.scales[rows], offsets, self.group, self.bits)

    def above(self, other: "QuantizedWeight") -> "QuantizedWeight":
        """The outputs of both, this one's first. Raises ConfigError where bits or inputs differ."""
        if (self.bits, self.in_features) != (other.bits, other.in_features):
            raise ConfigError(
                f"outputs of {self.bits} bits and {self.in_features} inputs do not go with those of {other.bits} bits "
                f"and {other.in_features} inputs"
            )
        group = gcd(self.group, other.group)
        both = self.with_group(group), other.with_group(group)
        offsets = None
        if any(each.offsets is not None for each in both):
            offsets = torch.cat(
                [torch.zeros_like(each.scales) if each.offsets is None else each.offsets for each in both]
            )
        codes, scales = (torch.cat(parts) for parts in ([each.codes for each in both], [each.scales for each in both]))
        return QuantizedWeight(codes, scales, offsets, group, self.bits)


Fit = Callable[[Tensor], QuantizedWeight]
"""Finds scale, offset and codes of each group of ``[out, groups, group]``, in 4 bits."""


def kernel_group(group: int) -> int:
    """The largest group that the kernels compute with, and into which groups of ``group`` inputs can be cut.

    >>> kernel_group(896), kernel_group(48)
    (128, 16)
    """
    return next((size for size in reversed(GROUPS) if group % size == 0), GROUPS[0])


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 ``[out, in / 2]`` of codes from -8 to 7, ``[out, in]``."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 ``[out, in]``: the inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1).to(torch.int8) - 8


def can_quantise(shape: tuple[int, ...], group: int = DEFAULT_GROUP) -> bool:
    """Whether a weight of this shape can be cut into groups."""
    return len(shape) == 2 and shape[1] % group == 0


@torch.no_grad()
def quantise(weight: Tensor, bits: Bits, group: int = DEFAULT_GROUP, *, fit: Fit | None = None) -> QuantizedWeight:
    """Round a plain weight ``[out, in]``, of any floating-point type, to ``bits``.

    8 bits: a group's largest magnitude is code 127, so that no value is off by more than 1/254 of it. 4 bits: with an
    offset and the scale that `fitted` finds for each group, or with -8 for the value of the largest magnitude and no
    offset: whichever has the smaller squared error, over some of the outputs of a large weight. fit: finds the same as
    `fitted`, in its place, faster.

    Raises ConfigError for a shape that cannot be cut into groups, or values that are not finite.

    >>> weight = quantise(torch.tensor([[1.0, -0.5] * 16]), 8)
    >>> weight.codes[0, :2].tolist()
    [127, -64]
    """
    if not can_quantise(tuple(weight.shape), group):
        raise ConfigError(f"a weight of shape {list(weight.shape)} cannot be quantised in groups of {group} inputs")
    some = weight[:: -(-weight.numel() // _SAMPLE)]
    fit = fitted if fit is None else fit
    offsets = bits == 4 and _gain_by_offsets(_groups(some, group), fit) > 0
    outputs, inputs = weight.shape
    codes = weight.new_empty(outputs, inputs * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = weight.new_empty(outputs, inputs // group, dtype=torch.float32)
    whole = QuantizedWeight(codes, scales, torch.empty_like(scales) if offsets else None, group, bits)
    rows = max(1, _SLICE // inputs)
    for start in range(0, outputs, rows):
        values = _groups(weight[start : start + rows], group)
        whole.rows(start, start + rows).fill(fit(values) if offsets else _rounded(values, bits))
    return whole


def _groups(weight: Tensor, group: int) -> Tensor:
    """fp32 ``[out, groups, group]``. Raises ConfigError for values that are not finite."""
    values = weight.detach().float().reshape(weight.shape[0], -1, group)
    if not all(map(isfinite, torch.aminmax(values))):  # NaN among them is both
        raise ConfigError("the weights hold values that are not finite, which cannot be quantised")
    return values


def _gain_by_offsets(values: Tensor, fit: Fit) -> float:
    """By how much the squared error of 4 bits is smaller with offsets."""
    without, with_them = _rounded(values, 4).dequantised(), fit(values).dequantised()
    flat = values.flatten(1)
    return float((without - flat).square().sum() - (with_them - flat).square().sum())


def _rounded(values: Tensor, bits: Bits) -> QuantizedWeight:
    """values: ``[out, groups, group]``. Each to its nearest code; zeros where a scale is too small for any."""
    if bits == 8:
        scales = values.abs().amax(dim=-1) / 127
    else:
        scales = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))[..., 0] / -8
    most_code = 2 ** (bits - 1) - 1
    codes = (values * _inverse(scales)[..., None]).round_().clamp_(-most_code - 1, most_code).to(torch.int8)
    codes = codes.view(values.shape[0], -1)
    return QuantizedWeight(codes if bits == 8 else pack_nibbles(codes), scales, None, values.shape[-1], bits)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() > torch.finfo(torch.float32).tiny, 1 / scales, 0)


def _sum(columns: Tensor) -> Tensor:
    """Along the first axis, one after the other: in the order in which the kernels add."""
    total = columns[0].clone()
    for each in columns[1:]:
        total += each
    return total


def fitted(values: Tensor) -> QuantizedWeight:
    """4 bits with offsets, of float32 ``[out, groups, group]``: a search for each group's smallest squared error.

    From some ranges, of which the narrower ones clip the outermost values, it goes to the nearest codes, from these to
    the scale and offset with the least squared error, and again. llama.cpp's ``make_qkx2_quants`` searches like this.
    native/rounding.cpp does the same operations in the same order.
    """
    out, groups, size = values.shape
    columns = values.reshape(-1, size).t().contiguous()  # sums go along the first axis, in whole vectors
    least, most = columns.amin(dim=0), columns.amax(dim=0)
    middle = (least + most) / 2
    columns -= middle
    total = _sum(columns)
    codes, work = torch.empty_like(columns), torch.empty_like(columns)

    def to_codes(scale: Tensor, offset: Tensor) -> None:
        torch.sub(columns, offset, out=codes).mul_(_inverse(scale)).round_().clamp_(-8, 7)

    def fit() -> tuple[Tensor, Tensor, Tensor]:
        """By how much the squared error is smaller than without codes; scale; offset."""
        mean = _sum(codes) / size
        products = _sum(torch.mul(codes, columns, out=work)) - mean * total
        squares = _sum(torch.mul(codes, codes, out=work)) - size * mean * mean
        scale = torch.where(squares > 0, products / squares, 0)
        return scale * products, scale, total / size - scale * mean

    best = (torch.full_like(total, -torch.inf), total, total)
    for width in _WIDTHS:
        scale = (most - least) * (width / 15)
        offset = scale / 2
        for _ in range(_FITS):
            to_codes(scale, offset)
            gain, scale, offset = fit()
        better = gain > best[0]
        best = (
            torch.where(better, gain, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, offset, best[2]),
        )
    _, scale, offset = best
    to_codes(scale, offset)
    return QuantizedWeight(
        pack_nibbles(codes.t().to(torch.int8).reshape(out, -1)),
        scale.view(out, groups),
        (offset + middle).view(out, groups),
        size,
        4,
    )
