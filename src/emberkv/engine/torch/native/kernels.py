"""The compiled library's functions, with their arguments' structures field by field as in the C++ sources."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from emberkv.engine.torch.native.build import build
from emberkv.errors import KernelsError, UnsupportedModelError

TASK = np.dtype(
    [(name, np.int32) for name in ("first_row", "rows", "table", "first_span", "last_span", "stop", "whole")]
)
"""A run of spans for some rows; see `Task` in calls.hpp."""

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What is computed, by its number in vectors.hpp."""

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def type_number(*tensors: torch.Tensor) -> int:
    """The type of all of these, by its number in `TYPES`.

    Raises UnsupportedModelError for any other and for a mixture: the kernels would read beyond the end of a tensor.
    """
    kinds = {tensor.dtype for tensor in tensors}
    number = TYPES.get(kinds.pop()) if len(kinds) == 1 else None
    if number is None:
        given = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise UnsupportedModelError(
            f"the C++ kernels are given {given}; they take all float32 or all bfloat16: serve with --kernels torch"
        )
    return number


class AttentionCall(ctypes.Structure):
    """One layer's attention, for all rows of a pass."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("queries", "keys", "values", "out")),
        *((f"{name}_{axis}", _LONG) for name in ("query", "key", "value") for axis in ("row", "head")),
        ("pool", _ADDRESS),
        *((name, _LONG) for name in ("slot_bytes", "value_bytes")),
        *((name, _INT) for name in ("rows", "heads", "kv_heads", "dim", "block_size", "type")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("window", "threads")),
        *((name, _ADDRESS) for name in ("slots", "tables", "positions", "tasks")),
        ("num_tasks", _LONG),
        *((name, _ADDRESS) for name in ("row_ids", "partial_of", "partials")),
    )


class LinearCall(ctypes.Structure):
    """One linear layer, or two with a gate between, for some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("inputs", "weight", "bias", "out")),
        ("input_row", _LONG),
        *((name, _INT) for name in ("rows", "in_features", "out_features", "type", "activation", "threads")),
    )


class NormCall(ctypes.Structure):
    """One normalization of some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("inputs", "scale", "out")),
        ("input_row", _LONG),
        *((name, _INT) for name in ("rows", "size", "type", "threads")),
        ("epsilon", _FLOAT),
    )


class Kernels:
    """The loaded library. Its functions let other Python threads run, and trust what they are given.

    identity: of the machine code; equal ones give equal bits. span: keys whose softmax is computed at once. lanes: fp32
    values in a vector. columns: outputs of a linear layer computed side by side.
    """

    def __init__(self, library: Path) -> None:
        """Raises KernelsError when the file cannot be loaded."""
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise KernelsError(f"{library} cannot be loaded: {error}") from error
        self.identity = library.stem
        self.span = int(loaded.emberkv_span())
        self.lanes = int(loaded.emberkv_lanes())
        self.columns = int(loaded.emberkv_columns())
        self._attend, self._linear = loaded.emberkv_attend, loaded.emberkv_linear
        self._rms_norm = loaded.emberkv_rms_norm
        for function in (self._attend, self._linear, self._rms_norm):
            function.restype = None

    @classmethod
    def built(cls, folder: Path, on_compile: Callable[[], None] = lambda: None) -> "Kernels":
        """Compiled into ``folder`` if they are not there, after a call of ``on_compile``. Raises KernelsError."""
        return cls(build(folder, on_compile))

    def attend(self, call: AttentionCall) -> None:
        self._attend(ctypes.byref(call))

    def linear(self, call: LinearCall) -> None:
        self._linear(ctypes.byref(call))

    def rms_norm(self, call: NormCall) -> None:
        self._rms_norm(ctypes.byref(call))
