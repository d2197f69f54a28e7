"""Whether the kernels compute a model on this machine."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from emberkv.engine.torch.model.loader import LoadedModel, ModelDtypes
from emberkv.engine.torch.native.kernels import TYPES, Kernels
from emberkv.errors import KernelsError

_log = logging.getLogger(__name__)


def can_compute(loaded: LoadedModel, block_size: int) -> bool:
    """Whether the kernels compute on this model's device, in its type, over blocks of so many tokens."""
    return _on_cpu(loaded) and _in_pairs(loaded, block_size)


def _on_cpu(loaded: LoadedModel) -> bool:
    dtypes = loaded.dtypes
    return loaded.device.type == "cpu" and dtypes.kv in TYPES and dtypes == ModelDtypes.all_of(dtypes.kv)


def _in_pairs(loaded: LoadedModel, block_size: int) -> bool:
    """Whether values of bf16 fill the pairs in which the pool holds them, of a head's and of neighbouring tokens'."""
    return loaded.dtypes.kv is not torch.bfloat16 or (block_size % 2 == 0 and loaded.geometry.head_dim % 2 == 0)


def find_kernels(
    wanted: Literal["auto", "native", "torch"],
    loaded: LoadedModel,
    block_size: int,
    folder: Path,
    on_compile: Callable[[], None] = lambda: None,
) -> Kernels | None:
    """The kernels, compiled into ``folder`` if they are not there yet; None leaves the model to torch.

    on_compile: called before they are compiled.

    "auto" does without them where "native" raises KernelsError, and says why if it need not be so.
    """
    if wanted == "torch" or (wanted == "auto" and not _on_cpu(loaded)):
        return None
    try:
        if not _on_cpu(loaded):
            raise KernelsError(
                f"the C++ kernels compute float32 and bfloat16 on a CPU; the model is {loaded.dtypes} on "
                f"{loaded.device}"
            )
        if not _in_pairs(loaded, block_size):
            raise KernelsError(
                f"the C++ kernels take bfloat16 in heads and blocks of even size; here heads are of "
                f"{loaded.geometry.head_dim} and blocks of {block_size}"
            )
        return Kernels.built(folder, on_compile)
    except KernelsError as error:
        if wanted == "native":
            raise
        _log.warning("torch computes in place of the C++ kernels, which takes longer: %s", error)
        return None
