"""Tensors as JSON: what goes in comes out, and no pickle but a plain tensor's is read."""

import base64
import collections
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.errors import TensorError
from emberkv.tensors import ITEM_BYTES, TensorFormat, deserialize_tensor, is_tensor_dict, serialize_tensor

SHAPES = st.lists(st.integers(0, 4), max_size=4)
FORMATS = st.sampled_from(["raw", "safetensors"])


def saved(value: object, shape: list[int], dtype: str, **options: Any) -> dict[str, Any]:
    """A value as ``torch.save`` writes it, under a shape and a dtype."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return payload(file.getvalue(), shape, dtype)


def payload(data: bytes, shape: list[int], dtype: str = "torch.float32") -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), "shape": shape, "dtype": dtype}


def random_tensor(shape: list[int], dtype: str, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (100 * torch.randn(shape, generator=random)).to(getattr(torch, dtype))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(sorted(ITEM_BYTES)), FORMATS, st.integers(0, 9))
def test_a_tensor_comes_back_as_it_was(shape: list[int], dtype: str, format: TensorFormat, seed: int) -> None:
    tensor = random_tensor(shape, dtype, seed)
    value = json.loads(json.dumps(serialize_tensor(tensor, format=format)))
    assert is_tensor_dict(value)
    assert (value["shape"], value["dtype"], value["format"]) == (shape, f"torch.{dtype}", format)
    found = deserialize_tensor(value, library="torch")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(sorted(set(ITEM_BYTES) - {"bfloat16"})), FORMATS, st.integers(0, 9))
def test_an_array_comes_back_as_it_was(shape: list[int], dtype: str, format: TensorFormat, seed: int) -> None:
    array = random_tensor(shape, dtype, seed).numpy()
    found = deserialize_tensor(serialize_tensor(array, format=format), library="numpy")
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert np.array_equal(found, array)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from(sorted(ITEM_BYTES)), st.integers(0, 9))
def test_what_torch_save_wrote_is_read(shape: list[int], dtype: str, seed: int) -> None:
    tensor = random_tensor(shape, dtype, seed)
    found = deserialize_tensor(saved(tensor, shape, f"torch.{dtype}"), library="torch")
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


def test_a_view_and_a_foreign_byte_order_are_written_by_value() -> None:
    transposed = torch.arange(6.0).reshape(2, 3).t()
    assert torch.equal(deserialize_tensor(serialize_tensor(transposed), library="torch"), transposed)
    assert torch.equal(deserialize_tensor(saved(transposed, [3, 2], "torch.float32"), library="torch"), transposed)
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    assert np.array_equal(deserialize_tensor(serialize_tensor(big), library="numpy"), big)


def test_the_raw_form_is_little_endian_and_holds_nothing_else() -> None:
    value = serialize_tensor(np.array([1, 258], np.int32))
    assert base64.b64decode(value["data"]) == bytes([1, 0, 0, 0, 2, 1, 0, 0])


def test_numpy_reads_bfloat16_as_float32_of_equal_values() -> None:
    tensor = torch.tensor([1.0, -2.5, 3e38]).bfloat16()
    found = deserialize_tensor(serialize_tensor(tensor), library="numpy")
    assert found.dtype == np.float32
    assert found.tolist() == tensor.float().tolist()


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "written"
    value = saved(Malicious(path), [1], "torch.float32", pickle_protocol=protocol)
    with pytest.raises(TensorError, match=r"names|without the one small pickle"):
        deserialize_tensor(value)
    with pytest.raises(TensorError):
        deserialize_tensor(payload(pickle.dumps(Malicious(path), protocol=protocol), [1]))
    assert not path.exists()


def compressed(shape: list[int]) -> dict[str, Any]:
    """A file whose storage is small and unpacks to 64 MiB."""
    stored = zipfile.ZipFile(io.BytesIO(base64.b64decode(saved(torch.zeros(2**24), [2**24], "torch.float32")["data"])))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in stored.infolist():
            file.writestr(entry.filename, stored.read(entry))
    return payload(packed.getvalue(), shape)


REFUSED: dict[str, tuple[object, str]] = {
    "no object": ([1.0], "object with"),
    "a field is missing": ({"data": "", "shape": [0]}, "object with"),
    "unknown dtype": (payload(b"", [0], "torch.complex64") | {"format": "raw"}, "complex64"),
    "dtype is no string": (payload(b"", [0]) | {"dtype": 32, "format": "raw"}, "dtype is '32'"),
    "shape is no list": (payload(b"", [0]) | {"shape": 4, "format": "raw"}, "shape is 4"),
    "negative size": (payload(b"", [-1]) | {"format": "raw"}, "0 or more"),
    "a size that is true": (payload(b"1234", [0]) | {"shape": [True], "format": "raw"}, "0 or more"),
    "too many dimensions": (payload(b"", [0] * 9) | {"format": "raw"}, "at most 8"),
    "too few bytes": (payload(b"1234567", [2]) | {"format": "raw"}, "has 7 bytes; shape .* needs 8"),
    "too large": (payload(b"", [2**20, 2**20]) | {"format": "raw"}, "at most"),
    "no base64": ({"data": "%%%", "shape": [1], "dtype": "torch.float32", "format": "raw"}, "base64"),
    "data is no string": ({"data": 5, "shape": [1], "dtype": "torch.float32", "format": "raw"}, "base64 string"),
    "unknown format": (payload(b"1234", [1]) | {"format": "npy"}, "npy"),
    "bytes that torch did not save": (payload(b"1234", [1]), "torch.save"),
    "no safetensors": (payload(b"123456789", [1]) | {"format": "safetensors"}, "safetensors"),
    "another shape than said": (saved(torch.zeros(4), [2, 2], "torch.float32"), r"shape \[4\]"),
    "another dtype than said": (saved(torch.zeros(4).half(), [4], "torch.float32"), "float16"),
    "a dictionary": (saved(collections.OrderedDict(a=torch.zeros(1)), [1], "torch.float32"), "something else"),
    "a parameter": (saved(torch.nn.Parameter(torch.zeros(1)), [1], "torch.float32"), "_rebuild_parameter"),
    "torch's old form": (
        saved(torch.zeros(1), [1], "torch.float32", _use_new_zipfile_serialization=False),
        "torch.save",
    ),
    "a large tensor of little data": (
        saved(torch.zeros(1).expand(2**40), [1], "torch.float32"),
        "bytes are read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(TensorError, match=message):
        deserialize_tensor(value)


def test_a_compressed_archive_is_refused() -> None:
    with pytest.raises(TensorError, match="compressed"):
        deserialize_tensor(compressed([1]))


def test_a_limit_of_bytes_holds_for_the_tensor() -> None:
    value = serialize_tensor(np.zeros(4, np.float32))
    assert deserialize_tensor(value, max_bytes=16, library="numpy").shape == (4,)
    with pytest.raises(TensorError, match="at most 15"):
        deserialize_tensor(value, max_bytes=15)


@pytest.mark.parametrize("value", [None, [], "text", {"data": "", "shape": []}])
def test_other_values_are_no_tensors(value: object) -> None:
    assert not is_tensor_dict(value)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None
import numpy as np
from emberkv.errors import TensorError
from emberkv.tensors import deserialize_tensor, serialize_tensor
array = np.arange(6, dtype=np.float16).reshape(2, 3)
value = serialize_tensor(array)
assert np.array_equal(deserialize_tensor(value), array)
del value["format"]
try:
    deserialize_tensor(value)
except TensorError as error:
    print(error)
"""


def test_arrays_need_no_torch() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "torch, which is not installed" in answer.stdout
