"""Whether the kernels compute a model on this machine."""

import logging
from pathlib import Path
from typing import Literal

from emberkv.engine.loader import LoadedModel
from emberkv.engine.native.kernels import Kernels
from emberkv.engine.native.layers import can_compute
from emberkv.errors import KernelsError

_log = logging.getLogger(__name__)


def find_kernels(wanted: Literal["auto", "native", "torch"], loaded: LoadedModel, folder: Path) -> Kernels | None:
    """The kernels, compiled into ``folder`` if they are not there yet; None leaves the model to torch.

    "auto" does without them, and says why, where "native" raises KernelsError.
    """
    if wanted == "torch" or (wanted == "auto" and not can_compute(loaded)):
        return None
    try:
        if not can_compute(loaded):
            raise KernelsError(
                f"the C++ kernels compute float32 and bfloat16 on a CPU; the model is {loaded.dtype} on {loaded.device}"
            )
        return Kernels.built(folder)
    except KernelsError as error:
        if wanted == "native":
            raise
        _log.warning("torch computes in place of the C++ kernels, which takes longer: %s", error)
        return None
