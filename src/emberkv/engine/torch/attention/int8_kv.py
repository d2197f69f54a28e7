"""Keys and values in 8 bits: how they are rounded, and where a row of the pool holds them.

The C++ kernels read and write the same bytes (native/layout_int8.hpp).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from emberkv.engine.torch.model.geometry import HeadShape, ModelGeometry
from emberkv.errors import ConfigError

_LARGEST = 127
_NAN = 0x7FC0


def check_int8_kv(geometry: ModelGeometry, block_size: int) -> None:
    """Raises ConfigError where values do not fill the pairs in which a block holds them, or a block holds other state,
    which is not rounded.
    """
    if geometry.states:
        raise ConfigError(
            "--kv-dtype int8 does not take a model with short convolutions or recurrent layers: use --kv-dtype auto"
        )
    odd = geometry.odd_head_dim()
    if odd is not None or block_size % 2:
        dim = odd or geometry.head_dim
        raise ConfigError(
            f"--kv-dtype int8 takes heads and blocks of even size; here heads are of {dim} and blocks of "
            f"{block_size}: use --kv-dtype auto, or another --block-size"
        )


class QuantisedHeads(NamedTuple):
    """integers: int8 ``[..., dim]``, from -127 to 127. scales: bf16 ``[...]``, the step of a head's integers."""

    integers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "QuantisedHeads":
        """Round ``[..., dim]``, each head of each token by itself.

        The scale is a 127th of the largest value, rounded up to bf16, so that it takes two bytes, has the exponents of
        float32, and leaves no value beyond 127. A head with a value that is not finite has NaN as its scale.
        """
        wide = values.float()
        most = wide.abs().amax(dim=-1)
        scales = _rounded_up(most / _LARGEST)
        each = scales.float().unsqueeze(-1)
        integers = torch.where(each > 0, torch.round(wide / each), 0.0)
        return cls(integers.to(torch.int8), scales)

    def values(self, dtype: torch.dtype) -> Tensor:
        """``[..., dim]``, rounded to ``dtype``."""
        return (self.integers.float() * self.scales.float().unsqueeze(-1)).to(dtype)


def _rounded_up(values: Tensor) -> Tensor:
    """float32 that is not negative to bf16; to one and the same NaN where it is not finite."""
    bits = torch.where(values.isfinite(), (values.view(torch.int32) + 0xFFFF) >> 16, _NAN)
    return bits.to(torch.int16).view(torch.bfloat16)


class Int8Rows:
    """Views of int8 ``[rows, bytes]``: each row has the keys, or the values, of a block in one layer.

    Of each head, keys are ``[dim / 2, block_size, 2]`` and values ``[block_size / 2, dim, 2]``. Behind those of all
    heads are the scales, bf16 ``[kv_heads, block_size]``.
    """

    def __init__(self, rows: Tensor, shape: HeadShape, block_size: int) -> None:
        _, heads, dim = shape
        integers = rows[:, : heads * dim * block_size]
        self._size = block_size
        keys = integers.view(-1, heads, dim // 2, block_size, 2)
        values = integers.view(-1, heads, block_size // 2, dim, 2)
        scales = rows[:, heads * dim * block_size :].view(torch.bfloat16).view(-1, heads, block_size)
        self._keys = keys.permute(0, 3, 1, 2, 4)  # [rows, block_size, heads, dim / 2, 2]
        self._values = values.permute(0, 2, 4, 1, 3)  # [rows, block_size / 2, 2, heads, dim]
        self._scales = scales.transpose(1, 2)  # [rows, block_size, heads]

    def keys(self) -> QuantisedHeads:
        """``[rows * block_size, heads, dim]``, where the rows are of keys."""
        return QuantisedHeads(self._keys.flatten(3).flatten(0, 1), self._scales.flatten(0, 1))

    def values(self) -> QuantisedHeads:
        """``[rows * block_size, heads, dim]``, where the rows are of values."""
        return QuantisedHeads(self._values.flatten(0, 2), self._scales.flatten(0, 1))

    def write_keys(self, rows: Tensor, offsets: Tensor, keys: Tensor) -> None:
        """Round ``[tokens, heads, dim]`` into ``rows``, at these ``offsets`` of tokens within them."""
        rounded = QuantisedHeads.of(keys)
        self._keys[rows, offsets] = rounded.integers.view(*keys.shape[:-1], -1, 2)
        self._scales[rows, offsets] = rounded.scales

    def write_values(self, rows: Tensor, offsets: Tensor, values: Tensor) -> None:
        """As `write_keys`."""
        rounded = QuantisedHeads.of(values)
        self._values[rows, offsets // 2, offsets % 2] = rounded.integers
        self._scales[rows, offsets] = rounded.scales
