"""The blocks of a GGUF file's quantised tensors: their integers and scales, as ggml lays them out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from emberkv.engine.torch.quantization.stored import from_signed
from emberkv.engine.torch.quantization.weight import QuantizedWeight

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Codes = NDArray[np.int16]

_Parts = tuple[Codes, Floats, Floats | None]
"""Signed codes ``[blocks, values]``, and scales and offsets ``[blocks, values / group]``."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """bits: in which the codes are held. read: the parts of blocks, ``[blocks, bytes of a block]``."""

    bits: int
    group: int
    has_offsets: bool
    read: Callable[[Bytes], _Parts]


def read_blocks(rows: Bytes, kind: GGMLQuantizationType) -> QuantizedWeight:
    """The weight in ``rows``, ``[out, bytes of a row]``, of a type in `BLOCK_TYPES`."""
    known = BLOCK_TYPES[kind]
    _, size = GGML_QUANT_SIZES[kind]
    out_features = rows.shape[0]
    codes, scales, offsets = known.read(np.ascontiguousarray(rows).reshape(-1, size))
    return from_signed(
        torch.from_numpy(codes.reshape(out_features, -1)),
        torch.from_numpy(scales.reshape(out_features, -1)),
        None if offsets is None else torch.from_numpy(offsets.reshape(out_features, -1)),
        known.bits,
    )


def _halves(blocks: Bytes, start: int) -> Floats:
    """float32 ``[blocks, 1]`` of the float16 at byte ``start``."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Codes:
    """First the low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)


def _fifth_bits(packed: Bytes) -> Codes:
    """``[blocks, 32]`` of 4 bytes: 16 where a value's fifth bit is set."""
    return np.unpackbits(packed, axis=-1, bitorder="little").astype(np.int16) << 4


def _q4_0(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 2:]) - 8, _halves(blocks, 0), None


def _q4_1(blocks: Bytes) -> _Parts:
    scales = _halves(blocks, 0)
    return _nibbles(blocks[:, 4:]) - 8, scales, _halves(blocks, 2) + 8 * scales


def _q5_0(blocks: Bytes) -> _Parts:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])) - 16, _halves(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Parts:
    scales = _halves(blocks, 0)
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes - 16, scales, _halves(blocks, 2) + 16 * scales


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, 2:].view(np.int8).astype(np.int16), _halves(blocks, 0), None


def _k_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of 6 bits, ``[blocks, 8]`` each, of 12 bytes."""
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=-1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_parts(blocks: Bytes, codes: Codes, middle: int) -> _Parts:
    """Of ``[blocks, 256]`` unsigned codes below twice ``middle``."""
    factors, minima = _k_scales(blocks[:, 4:16])
    scales = _halves(blocks, 0) * factors
    return codes - middle, scales, middle * scales - _halves(blocks, 2) * minima


def _k_nibbles(packed: Bytes) -> Codes:
    """``[blocks, 256]`` of 128 bytes: of each 32 bytes, first the low halves, then the high ones."""
    return _nibbles(packed.reshape(len(packed), 4, 32)).reshape(len(packed), 256)


def _pairs_of_bits(packed: Bytes) -> Codes:
    """``[blocks, 256]`` of 64 bytes: of each 32 bytes, first the lowest two bits of all, and so on."""
    parts = packed.reshape(len(packed), 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return (parts & 3).astype(np.int16).reshape(len(packed), 256)


def _q2_k(blocks: Bytes) -> _Parts:
    scales = _halves(blocks, 80) * (blocks[:, :16] & 15)
    return _pairs_of_bits(blocks[:, 16:80]), scales, -_halves(blocks, 82) * (blocks[:, :16] >> 4)


def _q3_k(blocks: Bytes) -> _Parts:
    """Codes of -4 to 3: a set bit of the mask leaves a value as its two low bits say."""
    third = np.unpackbits(blocks[:, :32, None], axis=-1, bitorder="little")  # [blocks, 32 values, 8 groups]
    codes = _pairs_of_bits(blocks[:, 32:96]) - 4 * (1 - third.transpose(0, 2, 1).reshape(len(blocks), 256))
    low = _nibbles(blocks[:, 96:104])
    high = blocks[:, None, 104:108] >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    factors = (low | ((high & 3).astype(np.int16).reshape(len(blocks), 16) << 4)) - 32
    return codes.astype(np.int16), _halves(blocks, 108) * factors, None


def _q4_k(blocks: Bytes) -> _Parts:
    return _k_parts(blocks, _k_nibbles(blocks[:, 16:]), 8)


def _q5_k(blocks: Bytes) -> _Parts:
    bits = np.unpackbits(blocks[:, 16:48, None], axis=-1, bitorder="little")  # [blocks, 32 values, 8 groups]
    fifth = bits.transpose(0, 2, 1).reshape(len(blocks), 256).astype(np.int16) << 4
    return _k_parts(blocks, _k_nibbles(blocks[:, 48:]) | fifth, 16)


def _q6_k(blocks: Bytes) -> _Parts:
    count = len(blocks)
    low = _nibbles(blocks[:, 0:128].reshape(count, 2, 64)).reshape(count, 256)
    pairs = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (pairs & 3).astype(np.int16).reshape(count, 256) << 4
    factors = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high) - 32, _halves(blocks, 208) * factors, None


_UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int16)
"""The integers that the 16 codes of IQ4 stand for."""


def _iq4_nl(blocks: Bytes) -> _Parts:
    return _UNEVEN[_nibbles(blocks[:, 2:])], _halves(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> _Parts:
    count = len(blocks)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(count, 8)
    high = blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    factors = (low | ((high & 3) << 4)).astype(np.float32) - 32
    codes = _nibbles(blocks[:, 8:].reshape(count, 8, 16)).reshape(count, 256)
    return _UNEVEN[codes], _halves(blocks, 0) * factors, None


_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int16)
"""Twice the values of 4 bits with an exponent of two."""


def _mxfp4(blocks: Bytes) -> _Parts:
    exponents = blocks[:, :1].astype(np.int32) - 128  # of half the scale
    return _TWICE_E2M1[_nibbles(blocks[:, 1:])], np.ldexp(np.float32(1), exponents), None


BLOCK_TYPES: Mapping[GGMLQuantizationType, BlockType] = {
    GGMLQuantizationType.Q4_0: BlockType(4, 32, False, _q4_0),
    GGMLQuantizationType.Q4_1: BlockType(4, 32, True, _q4_1),
    GGMLQuantizationType.Q5_0: BlockType(8, 32, False, _q5_0),
    GGMLQuantizationType.Q5_1: BlockType(8, 32, True, _q5_1),
    GGMLQuantizationType.Q8_0: BlockType(8, 32, False, _q8_0),
    GGMLQuantizationType.Q2_K: BlockType(4, 16, True, _q2_k),
    GGMLQuantizationType.Q3_K: BlockType(4, 16, False, _q3_k),
    GGMLQuantizationType.Q4_K: BlockType(4, 32, True, _q4_k),
    GGMLQuantizationType.Q5_K: BlockType(8, 32, True, _q5_k),
    GGMLQuantizationType.Q6_K: BlockType(8, 16, False, _q6_k),
    GGMLQuantizationType.IQ4_NL: BlockType(8, 32, False, _iq4_nl),
    GGMLQuantizationType.IQ4_XS: BlockType(8, 32, False, _iq4_xs),
    GGMLQuantizationType.MXFP4: BlockType(8, 32, False, _mxfp4),
}
"""What is held integer by integer: 2 and 3 bits in 4, and 5, 6 and the unequally spaced 4 of IQ4 and MXFP4 in 8."""
