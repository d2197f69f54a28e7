"""The C++ kernels: compiled once for this machine's processor, loaded, and called with structures as in the sources."""

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from emberkv.engine.torch.model.loader import LoadedModel, dtype_name
from emberkv.engine.torch.quantization.weight import DTYPES, QuantizedWeight, fitted
from emberkv.errors import KernelsError, UnsupportedModelError, UntrustedPathError
from emberkv.files import check_owner

_SOURCES = Path(__file__).parent
_COMPILERS = ("g++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-pthread", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip
_PATIENCE = 900.0  # seconds for a run of the compiler; on a machine with much else to do, one took four minutes


def build(folder: Path, on_compile: Callable[[], None] = lambda: None) -> Path:
    """The compiled library, below ``folder``, whose name is its identity: of sources, compiler, flags and processor.

    on_compile: called where it is not there yet, before it is compiled.

    Raises KernelsError, which says why there are no kernels here: among others, because another user could write
    into the folder, and so choose what this process runs.
    """
    if sys.platform != "linux":
        raise KernelsError(f"the C++ kernels are for Linux; this is {sys.platform}")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise KernelsError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH")
    sources = sorted(_SOURCES.glob("*.cpp"))
    known = hashlib.sha256(_predefined(compiler))
    for part in _FLAGS:
        known.update(f"\0{part}".encode())
    for path in (*sources, *sorted(_SOURCES.glob("*.hpp"))):
        known.update(b"\0" + path.read_bytes())
    library = folder / f"kernels-{known.hexdigest()[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_owner(folder)
        if not library.exists():
            on_compile()
            with _one_at_a_time(folder):
                if not library.exists():
                    _compile(compiler, sources, library)
        check_owner(library)
    except UntrustedPathError as error:
        raise KernelsError(f"the C++ kernels are not taken from {folder} (EMBERKV_MACHINE_CACHE): {error}") from error
    except OSError as error:
        raise KernelsError(f"the C++ kernels cannot be put into {folder}: {error}") from error
    return library


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for processes that compile into the folder: replicas that start together compile once between them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders; there each process compiles for itself
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _predefined(compiler: str) -> bytes:
    """The compiler's version and what it knows of the processor."""
    return _run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull], _SOURCES)


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="kernels-build-") as name:
        work = Path(name)
        _run([compiler, *_FLAGS, "-c", *map(str, sources)], work)
        objects = [f"{source.stem}.o" for source in sources]
        _run([compiler, "-shared", "-pthread", *objects, "-o", library.name], work)
        with (work / library.name).open("rb") as made:
            os.fsync(made.fileno())  # before its name is there: a half-written library would be found for ever
        (work / library.name).replace(library)


def _run(command: list[str], folder: Path) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - a fixed list, without a shell
            command, cwd=folder, capture_output=True, timeout=_PATIENCE, check=True
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise KernelsError(f"{command[0]} cannot compile the C++ kernels: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsError(f"{command[0]} cannot compile the C++ kernels: {error}") from error
    return done.stdout


TASK = np.dtype(
    [(name, np.int32) for name in ("first_row", "rows", "block_table", "first_span", "last_span", "stop", "whole")]
)
"""A run of spans for some rows; see `Task` in calls.hpp."""

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What is computed, by its number in vectors.hpp."""

_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def type_number(*given: torch.Tensor | torch.dtype) -> int:
    """The type of all of these, by its number in `TYPES`.

    Raises UnsupportedModelError for any other and for a mixture: the kernels would read beyond the end of a tensor.
    """
    kinds = [each.dtype if isinstance(each, torch.Tensor) else each for each in given]
    number = TYPES.get(kinds[0]) if len(set(kinds)) == 1 else None
    if number is None:
        raise UnsupportedModelError(
            f"the C++ kernels are given {', '.join(map(str, kinds))}; they take all float32 or all bfloat16: serve "
            "with --kernels torch"
        )
    return number


class AttentionCall(ctypes.Structure):
    """One layer's attention, for all rows of a pass."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("queries", "keys", "values", "out")),
        *((f"{name}_{axis}", _LONG) for name in ("query", "key", "value") for axis in ("row", "head")),
        ("pool", _ADDRESS),
        *((name, _LONG) for name in ("block_bytes", "value_bytes")),
        *((name, _INT) for name in ("rows", "heads", "kv_heads", "dim", "block_size", "type", "quantised")),
        *((name, _ADDRESS) for name in ("sinks", "slopes")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("window", "chunk", "threads")),
        *((name, _ADDRESS) for name in ("block_ids", "block_tables", "positions", "tasks")),
        ("num_tasks", _LONG),
        *((name, _ADDRESS) for name in ("row_ids", "partial_of", "partials")),
    )


class LinearCall(ctypes.Structure):
    """One linear layer, or two with a gate between, for some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("inputs", "weight", "bias", "out")),
        ("input_row", _LONG),
        *((name, _INT) for name in ("rows", "in_features", "out_features", "type", "activation", "threads")),
        *((name, _INT) for name in ("bits", "group", "offsets")),
        *((name, _FLOAT) for name in ("slope", "limit")),
    )


class ExpertsCall(ctypes.Structure):
    """A mixture of experts, for some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("inputs", "chosen", "weights", "out")),
        *((name, ctypes.POINTER(LinearCall)) for name in ("first", "second")),
        ("input_row", _LONG),
        *((name, _INT) for name in ("rows", "top_k", "experts", "size", "inner", "type", "threads")),
    )


class NormCall(ctypes.Structure):
    """One normalization of some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("inputs", "scale", "out")),
        ("input_row", _LONG),
        *((name, _INT) for name in ("rows", "size", "type", "threads")),
        ("epsilon", _FLOAT),
    )


class LikeliestCall(ctypes.Structure):
    """The largest logits of some rows."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("logits", "places", "values")),
        *((name, _INT) for name in ("rows", "columns", "type", "threads")),
    )


class FitCall(ctypes.Structure):
    """Groups of weights to be rounded to 4 bits."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("values", "codes", "scales", "offsets")),
        ("groups", _LONG),
        *((name, _INT) for name in ("size", "threads")),
    )


class RecurrenceCall(ctypes.Structure):
    """One layer with a linear recurrence, for all runs of a pass."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("mixed", "gate", "steps", "betas")),
        *((f"{name}_row", _LONG) for name in ("mixed", "gate", "steps", "betas")),
        *((name, _ADDRESS) for name in ("out", "taps", "bias", "log_decay", "step_bias", "skip", "scale")),
        *((name, _ADDRESS) for name in ("convolved", "decays", "results", "convolved_states", "states")),
        ("block_bytes", _LONG),
        *((name, _ADDRESS) for name in ("block_ids", "runs")),
        *(
            (name, _INT)
            for name in (
                "num_runs", "block_size", "rows", "columns", "channels", "heads", "key_heads", "depth", "width",
                "queries_at", "keys_at", "values_at", "delta", "norm_size", "gated_first", "type", "threads",
            )
        ),
        *((name, _FLOAT) for name in ("least_step", "most_step", "beta_factor", "epsilon")),
    )  # fmt: skip


class DecoderLayer(ctypes.Structure):
    """What a pass computes in one layer, but for what changes from pass to pass."""

    _fields_ = (
        *(
            (name, NormCall)
            for name in (
                "input_norm", "query_norm", "key_norm", "after_attention", "feedforward_norm", "after_feedforward",
            )
        ),
        *((name, LinearCall) for name in ("query", "key", "value", "out", "gate_up", "down")),
        *((name, _ADDRESS) for name in ("cos", "sin", "pool")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("rotary_dim", "fused", "plan")),
    )  # fmt: skip


class DecoderCall(ctypes.Structure):
    """A pass of some rows through all layers of a decoder."""

    _fields_ = (
        ("layers", ctypes.POINTER(DecoderLayer)),
        ("plans", ctypes.POINTER(AttentionCall)),
        ("norm", NormCall),
        ("output", LinearCall),
        *((name, _ADDRESS) for name in ("hidden", "scratch", "logits", "kept")),
        *(
            (name, _INT)
            for name in (
                "num_layers", "rows", "num_kept", "hidden_size", "intermediate_size", "heads", "kv_heads", "dim",
                "type", "threads",
            )
        ),
    )  # fmt: skip


class Kernels:
    """The loaded library. Its functions let other Python threads run, and trust what they are given.

    identity: of the machine code; equal ones give equal bits. span: keys whose softmax is computed at once. lanes: fp32
    values in a vector. columns: outputs of a linear layer computed side by side. most_columns: earlier tokens that a
    convolution may see.
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
        self._rms_norm, self._experts = loaded.emberkv_rms_norm, loaded.emberkv_experts
        self._linears = loaded.emberkv_linears
        self._decoder, self._likeliest = loaded.emberkv_decoder, loaded.emberkv_likeliest
        self._recurrence, self.most_columns = loaded.emberkv_recurrence, int(loaded.emberkv_most_columns())
        self._fit_groups, self._largest_group = loaded.emberkv_fit_groups, int(loaded.emberkv_largest_group())
        for function in (
            self._attend, self._linear, self._linears, self._rms_norm, self._experts, self._decoder, self._likeliest,
            self._recurrence, self._fit_groups,
        ):  # fmt: skip
            function.restype = None

    def __deepcopy__(self, memo: dict[int, object]) -> "Kernels":
        """Itself: it is a library. transformers copies configs, which may hold its methods."""
        return self

    @classmethod
    def built(cls, folder: Path, on_compile: Callable[[], None] = lambda: None) -> "Kernels":
        """Compiled into ``folder`` if they are not there, after a call of ``on_compile``. Raises KernelsError."""
        return cls(build(folder, on_compile))

    def attend(self, call: AttentionCall) -> None:
        self._attend(ctypes.byref(call))

    def linear(self, call: LinearCall) -> None:
        self._linear(ctypes.byref(call))

    def linears(self, calls: "ctypes.Array[LinearCall]") -> None:
        """Several layers, none of which needs another's output."""
        self._linears(calls, _INT(len(calls)))

    def experts(self, call: ExpertsCall) -> None:
        self._experts(ctypes.byref(call))

    def rms_norm(self, call: NormCall) -> None:
        self._rms_norm(ctypes.byref(call))

    def recurrence(self, call: RecurrenceCall) -> None:
        self._recurrence(ctypes.byref(call))

    def fitted(self, values: torch.Tensor) -> QuantizedWeight:
        """As `quantization.weight.fitted`, to the last bit, of ``[out, groups, size]`` in float32.

        Groups that are larger than the kernels take are left to it.
        """
        out, groups, size = values.shape
        if size > self._largest_group:
            return fitted(values)
        values = values.contiguous()
        codes = torch.empty(out, groups * size // 2, dtype=torch.uint8)
        scales, offsets = torch.empty(out, groups), torch.empty(out, groups)
        call = FitCall(
            values=values.data_ptr(), codes=codes.data_ptr(), scales=scales.data_ptr(), offsets=offsets.data_ptr(),
            groups=out * groups, size=size, threads=torch.get_num_threads(),
        )  # fmt: skip
        self._fit_groups(ctypes.byref(call))
        return QuantizedWeight(codes, scales, offsets, size, 4)

    def decoder(self, call: DecoderCall) -> None:
        self._decoder(ctypes.byref(call))

    def likeliest(self, logits: torch.Tensor) -> tuple[list[int], list[float]]:
        """Of each row of ``logits`` [n, vocab], contiguous: the first place of the largest, or of a NaN; and its value.

        Raises UnsupportedModelError for a type that the kernels do not take.
        """
        places, values = np.empty(len(logits), dtype=np.int64), np.empty(len(logits), dtype=np.float32)
        call = LikeliestCall(
            logits=logits.data_ptr(),
            places=places.ctypes.data,
            values=values.ctypes.data,
            rows=logits.shape[0],
            columns=logits.shape[1],
            type=type_number(logits),
            threads=torch.get_num_threads(),
        )
        self._likeliest(ctypes.byref(call))
        return places.tolist(), values.tolist()


_log = logging.getLogger(__name__)


def can_compute(loaded: LoadedModel, block_size: int) -> bool:
    """Whether the kernels compute on this model's device, in its type, over blocks of so many tokens."""
    return _on_cpu(loaded) and _in_pairs(loaded, block_size)


def _on_cpu(loaded: LoadedModel) -> bool:
    dtypes = loaded.dtypes
    weights = dtypes.weights in (dtypes.activations, *DTYPES.values())
    kv = dtypes.kv in (dtypes.activations, torch.int8)
    return loaded.device.type == "cpu" and dtypes.activations in TYPES and kv and weights


def _in_pairs(loaded: LoadedModel, block_size: int) -> bool:
    """Whether bf16 and int8 fill the pairs in which the pool holds them, of a head's and of neighbouring tokens'."""
    return loaded.dtypes.kv is torch.float32 or (block_size % 2 == 0 and loaded.geometry.odd_head_dim() is None)


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
            dim = loaded.geometry.odd_head_dim() or loaded.geometry.head_dim
            raise KernelsError(
                f"the C++ kernels take {dtype_name(loaded.dtypes.kv)} in heads and blocks of even size; here "
                f"heads are of {dim} and blocks of {block_size}"
            )
        return Kernels.built(folder, on_compile)
    except KernelsError as error:
        if wanted == "native":
            raise
        _log.warning("torch computes in place of the C++ kernels, which takes longer: %s", error)
        return None
