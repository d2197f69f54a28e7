"""Quantised checkpoints' tensors, packed one value at a time as each format publishes it."""

import torch
from torch import Tensor

Packed = dict[str, Tensor]

AWQ_POSITIONS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in the first, second... four bits of a word."""


def words(values: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, columns * bits / 32]`` of unsigned values, the first in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        packed = [
            sum(value << (bits * at) for at, value in enumerate(row[start : start + per_word]))
            for start in range(0, len(row), per_word)
        ]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def random_codes(out_features: int, in_features: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (out_features, in_features), generator=generator)


def random_scales(out_features: int, groups: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(out_features, groups, generator=generator) * 0.02 + 0.002).to(dtype)


def grouped(by_group: Tensor, group_of: Tensor) -> Tensor:
    """``[out, in]``: for each input, what its group has."""
    return by_group.float()[:, group_of]


def gptq(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, bits: int, *, first: bool) -> Packed:
    return {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words(((zeros - int(first)) % 2**bits).t(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
    def packed(values: Tensor) -> Tensor:
        by_input = values.t()
        order = [start + at for start in range(0, by_input.shape[1], 8) for at in AWQ_POSITIONS]
        return words(by_input[:, order], 4)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.t().contiguous()}


def compressed(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Packed:
    """pack-quantized, of unsigned codes and zero points."""
    stored = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        stored["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return stored


def mlx(codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Packed:
    return {"weight": words(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
