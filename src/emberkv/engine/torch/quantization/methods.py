"""Which method a checkpoint's weights are quantised by, as its config.json says."""

from collections.abc import Callable, Mapping
from typing import Any

from emberkv.engine.torch.quantization.awq import AWQ
from emberkv.engine.torch.quantization.compressed_tensors import CompressedTensors
from emberkv.engine.torch.quantization.fp8 import FP8
from emberkv.engine.torch.quantization.gptq import GPTQ
from emberkv.engine.torch.quantization.mlx import MLX
from emberkv.engine.torch.quantization.mxfp4 import MXFP4
from emberkv.engine.torch.quantization.stored import Method
from emberkv.errors import UnsupportedModelError

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
