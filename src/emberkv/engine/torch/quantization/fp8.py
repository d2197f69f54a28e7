"""FP8 checkpoints: values of E4M3 times a scale for a block, an output or the whole tensor (DeepSeek, Qwen and others).

The values are not equally spaced, so that no integers hold them. They are held in 16 bits, or rounded to 8 or 4 where
that is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emberkv.engine.torch.quantization.stored import LinearLayers, refuse, required
from emberkv.errors import CorruptModelError


@dataclass(frozen=True, slots=True)
class FP8(LinearLayers):
    """weight float8_e4m3fn ``[out, in]``; weight_scale_inv or weight_scale: the factor of each block."""

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
