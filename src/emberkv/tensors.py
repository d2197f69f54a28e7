"""KV tensors as JSON objects, without pickle: ``{"data": base64, "shape": [...], "dtype": "torch.float32"}``.

``format`` says what ``data`` holds: ``"raw"`` is the values alone, little-endian and in C order; ``"safetensors"`` is a
safetensors file with one tensor. Without ``format``, ``data`` is what ``torch.save`` wrote: it is read with
``weights_only=True``, after a check that it names nothing but what a plain tensor needs, and it is never written.

NumPy arrays need no torch. NumPy has no bfloat16, so that a bfloat16 tensor is read as float32 there, which holds each
of its values exactly.

>>> import numpy as np
>>> value = serialize_tensor(np.ones((2, 3), np.float32))
>>> value["shape"], value["dtype"], value["format"]
([2, 3], 'torch.float32', 'raw')
>>> deserialize_tensor(value, library="numpy").sum()
np.float32(6.0)
"""

import base64
import binascii
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from emberkv.errors import TensorError, reason_of

if TYPE_CHECKING:
    import torch

TensorFormat = Literal["raw", "safetensors"]

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of an element, by dtype."""

MAX_TENSOR_BYTES = 2**30
"""The largest tensor that is read where no other limit is given."""

MAX_DIMS = 8

_PREFIX = "torch."
_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_SAFETENSORS_HEAD = 64 * 1024  # bytes of a header with one tensor, generously

_SAVED_OVERHEAD = 2**20  # bytes of a torch.save file beside the tensor's storage
_SAVED_PICKLE = 64 * 1024
_SAVED_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
"""All that the pickle of a plain tensor names."""


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A tensor as its bytes, little-endian and in C order. dtype: one of `ITEM_BYTES`.

    Raises TensorError for bytes that are not as many as the shape and the dtype need.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        needed = _size(self.shape, self.dtype)
        if len(self.data) != needed:
            raise TensorError(
                f"the tensor's data has {len(self.data)} bytes; shape {list(self.shape)} of {self.dtype} needs {needed}"
            )


def is_tensor_dict(value: object) -> bool:
    """Whether a JSON value has the fields of a tensor; they may still be wrong, which `deserialize_tensor` finds."""
    return isinstance(value, Mapping) and {"data", "shape", "dtype"} <= value.keys()


def serialize_tensor(tensor: "torch.Tensor | NDArray[Any]", *, format: TensorFormat = "raw") -> dict[str, Any]:
    """A tensor, on any device and with any strides, as an object for JSON. Raises TensorError for a dtype that is not
    one of `ITEM_BYTES`.
    """
    return to_json(_bytes_of_array(tensor) if isinstance(tensor, np.ndarray) else _bytes_of_tensor(tensor), format)


@overload
def deserialize_tensor(
    value: object, *, library: Literal["numpy"], max_bytes: int = MAX_TENSOR_BYTES
) -> NDArray[Any]: ...


@overload
def deserialize_tensor(
    value: object, *, library: Literal["torch"], max_bytes: int = MAX_TENSOR_BYTES
) -> "torch.Tensor": ...


@overload
def deserialize_tensor(value: object, *, library: None = None, max_bytes: int = MAX_TENSOR_BYTES) -> Any: ...


def deserialize_tensor(
    value: object, *, library: Literal["numpy", "torch"] | None = None, max_bytes: int = MAX_TENSOR_BYTES
) -> Any:
    """The tensor of a JSON object, in memory of its own.

    library: whose tensor is wanted; None takes torch where it is installed, and NumPy elsewhere. max_bytes: of the
    tensor. Raises TensorError for a value that is no tensor, is too large, or holds any other pickle.
    """
    found = from_json(value, max_bytes=max_bytes)
    if library == "torch" or (library is None and find_spec("torch") is not None):
        return _tensor(found)
    return _array(found)


def to_json(tensor: TensorBytes, format: TensorFormat = "raw") -> dict[str, Any]:
    """A tensor's bytes as an object for JSON. Raises TensorError where safetensors is wanted and not installed."""
    data = tensor.data if format == "raw" else _as_safetensors(tensor)
    return {
        "data": base64.b64encode(data).decode("ascii"),
        "shape": list(tensor.shape),
        "dtype": f"{_PREFIX}{tensor.dtype}",
        "format": format,
    }


def from_json(value: object, *, max_bytes: int = MAX_TENSOR_BYTES) -> TensorBytes:
    """The bytes of a JSON object's tensor. Raises TensorError as `deserialize_tensor` does."""
    if not isinstance(value, Mapping) or not is_tensor_dict(value):
        raise TensorError('a tensor is an object with "data", "shape" and "dtype"')
    dtype, shape = _checked_dtype(value["dtype"]), _checked_shape(value["shape"])
    if _size(shape, dtype) > max_bytes:
        raise TensorError(
            f"shape {list(shape)} of {dtype} has {_size(shape, dtype)} bytes; at most {max_bytes} are read"
        )
    data = _decoded(value["data"], max_bytes)
    match value.get("format", "torch.save"):
        case "raw":
            return TensorBytes(dtype, shape, data)
        case "safetensors":
            found = _from_safetensors(data)
        case "torch.save" | None:
            found = _from_torch_save(data, max_bytes)
        case other:
            raise TensorError(f"format is {str(other)[:40]!r}; use raw or safetensors, or leave it out for torch.save")
    if (found.dtype, found.shape) != (dtype, shape):
        raise TensorError(
            f"data holds shape {list(found.shape)} of {found.dtype}, and the object says {list(shape)} of {dtype}"
        )
    return found


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _checked_dtype(given: object) -> str:
    name = given.removeprefix(_PREFIX) if isinstance(given, str) else ""
    if name not in ITEM_BYTES:
        raise TensorError(
            f"dtype is {str(given)[:40]!r}; use one of {', '.join(_PREFIX + each for each in ITEM_BYTES)}"
        )
    return name


def _checked_shape(given: object) -> tuple[int, ...]:
    if (
        not isinstance(given, list | tuple)
        or len(given) > MAX_DIMS
        or not all(type(size) is int and 0 <= size < 2**48 for size in given)
    ):
        raise TensorError(f"shape is {str(given)[:80]}; use a list of at most {MAX_DIMS} sizes, each 0 or more")
    return tuple(given)


def _decoded(given: object, max_bytes: int) -> bytes:
    if not isinstance(given, str):
        raise TensorError(f"data is of type {type(given).__name__}; it must be a base64 string")
    longest = (max_bytes + _SAVED_OVERHEAD) * 4 // 3 + 4
    if len(given) > longest:
        raise TensorError(f"data has {len(given)} characters; a tensor of at most {max_bytes} bytes has fewer")
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TensorError(f"data is not valid base64: {reason_of(error)}") from error


def _bytes_of_array(array: NDArray[Any]) -> TensorBytes:
    name = _checked_dtype(array.dtype.name)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return TensorBytes(name, array.shape, little.tobytes())


def _bytes_of_tensor(tensor: "torch.Tensor") -> TensorBytes:
    import torch  # noqa: PLC0415 - optional, and slow to import

    if not isinstance(tensor, torch.Tensor):
        raise TensorError(f"a {type(tensor).__name__} is given; give a torch.Tensor or a NumPy array")
    name = _checked_dtype(str(tensor.dtype))
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    itemsize = ITEM_BYTES[name]
    if np.little_endian or itemsize == 1:
        return TensorBytes(name, tuple(tensor.shape), values.tobytes())
    return TensorBytes(name, tuple(tensor.shape), values.reshape(-1, itemsize)[:, ::-1].tobytes())


def _array(tensor: TensorBytes) -> NDArray[Any]:
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        halves = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(tensor.shape)
    values = np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<"))
    return values.astype(tensor.dtype).reshape(tensor.shape)


def _tensor(tensor: TensorBytes) -> "torch.Tensor":
    try:
        import torch  # noqa: PLC0415 - optional, and slow to import
    except ModuleNotFoundError as error:
        raise TensorError(
            "torch is not installed: pip install '.[torch]' in emberkv's folder, or use library=\"numpy\""
        ) from error
    if tensor.dtype == "bfloat16":
        bits = np.frombuffer(tensor.data, "<i2").astype(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16).reshape(tensor.shape)
    return torch.from_numpy(_array(tensor))


def _as_safetensors(tensor: TensorBytes) -> bytes:
    try:
        if tensor.dtype == "bfloat16":  # NumPy has none
            from safetensors.torch import save as save_tensors  # noqa: PLC0415 - optional, and imports torch

            data: bytes = save_tensors({"tensor": _tensor(tensor)})
        else:
            from safetensors.numpy import save as save_arrays  # noqa: PLC0415 - optional

            data = save_arrays({"tensor": _array(tensor)})
    except ModuleNotFoundError as error:
        raise TensorError(
            "safetensors is not installed: pip install '.[torch]' in emberkv's folder, or use format \"raw\""
        ) from error
    return data


def _from_safetensors(data: bytes) -> TensorBytes:
    try:
        import safetensors  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise TensorError(
            "safetensors is not installed: pip install '.[torch]' in emberkv's folder, or send format \"raw\""
        ) from error
    if int.from_bytes(data[:8], "little") > _SAFETENSORS_HEAD:
        raise TensorError(f"data has a safetensors header of more than {_SAFETENSORS_HEAD} bytes; send one tensor")
    read: Callable[[bytes], Any] = safetensors.deserialize
    try:
        entries = read(data)
    except safetensors.SafetensorError as error:
        raise TensorError(f"data is no safetensors file: {reason_of(error)}") from error
    if len(entries) != 1:
        raise TensorError(f"data is a safetensors file of {len(entries)} tensors; send one")
    entry = entries[0][1]
    dtypes = {short: name for name, short in _SAFETENSORS_NAMES.items()}
    if entry["dtype"] not in dtypes:
        raise TensorError(f"data has dtype {entry['dtype']}; use one of {', '.join(dtypes)}")
    return TensorBytes(dtypes[entry["dtype"]], tuple(entry["shape"]), bytes(entry["data"]))


def _from_torch_save(data: bytes, max_bytes: int) -> TensorBytes:
    try:
        import torch  # noqa: PLC0415 - optional, and slow to import
    except ModuleNotFoundError as error:
        raise TensorError(
            'data without a format is read with torch, which is not installed here; send format "raw"'
        ) from error
    _check_torch_save(data, max_bytes)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for files that it cannot read
        raise TensorError(f"data is no tensor that torch.save wrote: {reason_of(error)}") from error
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise TensorError("data holds something else than one dense tensor; save tensor.detach() alone")
    shape, dtype = tuple(tensor.shape), _checked_dtype(str(tensor.dtype))
    if _size(shape, dtype) > max_bytes:  # strides of 0 make a large tensor of little data
        raise TensorError(f"data holds shape {list(shape)} of {dtype}; at most {max_bytes} bytes are read")
    return _bytes_of_tensor(tensor)


def _check_torch_save(data: bytes, max_bytes: int) -> None:
    """Before torch sees the file: it unpacks to no more than its tensor needs, and its pickle names only what a plain
    tensor is made of. Raises TensorError.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = file.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise TensorError("data is a compressed archive; send what torch.save wrote")
            if sum(entry.file_size for entry in entries) > max_bytes + _SAVED_OVERHEAD:
                raise TensorError(f"data unpacks to more than a tensor of {max_bytes} bytes")
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _SAVED_PICKLE:
                raise TensorError("data is an archive without the one small pickle that torch.save writes")
            found = set(_names_in(file.read(pickles[0])))
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise TensorError(f"data is not what torch.save writes: {reason_of(error)}") from error
    if foreign := found - _SAVED_GLOBALS:
        raise TensorError(
            f"data is a pickle that names {min(foreign)[:80]!r}; only a plain tensor that torch.save wrote is read: "
            "save tensor.detach() alone"
        )


def _names_in(pickle: bytes) -> Iterator[str]:
    """What a pickle would import, as "module name"; an opcode by which a name could come otherwise is given as one."""
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield opcode.name
