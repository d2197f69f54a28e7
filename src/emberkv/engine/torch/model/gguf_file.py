"""A GGUF file as a source of a model: its config, its tokenizer and its tensors, which stay quantised."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import gcd, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from emberkv.engine.tokenization.gguf_tokenizer import gguf_tokenizer, turn_ends
from emberkv.engine.torch.model.building import NamedWeight, build_model
from emberkv.engine.torch.model.expert_weights import expert_name, expert_part, gguf_expert_names
from emberkv.engine.torch.model.fingerprint import FileState, file_fingerprint, states_of
from emberkv.engine.torch.model.generation_config import GenerationConfigMode
from emberkv.engine.torch.model.gguf_config import ENDS, config_of, q_and_k_rows, token_ids
from emberkv.engine.torch.model.inspection import ModelShape, inspect_model
from emberkv.engine.torch.model.source import BUILDING
from emberkv.engine.torch.quantization.gguf_blocks import BLOCK_TYPES, read_blocks
from emberkv.engine.torch.quantization.stored import StoredWeight, affine_bytes
from emberkv.errors import CorruptModelError, EmberError, UnsupportedModelError, reason_of

_PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
_IN_CONFIG = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that `config_of` reads."""


class _Reader(gguf.GGUFReader):
    """Its own takes what lies beyond the end of a file for empty, and loops over as many values as an array claims. It
    also slices a memmap for each of a vocabulary's tokens, which takes most of the time.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        ordered = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        if offset + int(count) * ordered.itemsize > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, before what it says that it holds")
        return np.frombuffer(self.data, ordered, int(count), offset)


class GGUFSource:
    """A GGUF file of one of the architectures in `gguf_config.ARCHITECTURES`.

    Raises CorruptModelError for a file that is none, UnsupportedModelError naming what is not read of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
            self._fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # the library raises whatever numpy does on a file that is cut short
            raise CorruptModelError(f"{path} is no whole GGUF file: {reason_of(error)}") from error
        parts = self._fields.get("split.count")
        if parts is not None and not isinstance(parts, int):
            raise CorruptModelError(f"{path} gives no whole number as split.count")
        if parts is not None and parts > 1:
            raise UnsupportedModelError(
                f"{path} is one of {parts} parts; join them with llama-gguf-split --merge, and name the file it writes"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        odd = next((each for each in self._tensors.values() if not _is_read(each.tensor_type)), None)
        if odd is not None:
            raise UnsupportedModelError(
                f"{path} cannot be served: {odd.name} is in {odd.tensor_type.name}; "
                f"{', '.join(kind.name for kind in (*_PLAIN, *BLOCK_TYPES))} are read, such as a file in Q8_0 or Q4_K_M"
            )
        self.config: PretrainedConfig = config_of(path, self._fields, self._tensors, self._floats)

    @property
    def format(self) -> str:
        """Such as "GGUF, Q4_K and Q6_K": the types of most matrices first."""
        kinds = Counter(each.tensor_type.name for each in self._tensors.values() if len(each.shape) > 1)
        return f"GGUF, {' and '.join(kind for kind, _ in kinds.most_common())}"

    @property
    def held(self) -> str | None:
        bits = sorted({_bits(tensors) for tensors in self._quantised.values()})
        return f"{' and '.join(map(str, bits))} bits, value by value" if bits else None

    @cached_property
    def _names(self) -> dict[str, str]:
        """The parameter that each tensor is, or the part of one as `expert_part` knows it.

        Raises UnsupportedModelError for a tensor that is none.
        """
        mapping = gguf.get_tensor_name_map(_architecture(self._fields), self.config.num_hidden_layers)
        names: dict[str, str] = {}
        shape = inspect_model(self.config)
        for parameter in shape.shapes:
            if parameter.removesuffix("_bias") in shape.experts:
                names |= gguf_expert_names(parameter)
                continue
            found = mapping.get_name(parameter, try_suffixes=(".weight", ".bias"))
            if found is not None:
                names.setdefault(found if parameter.endswith((".weight", ".bias")) else f"{found}.weight", parameter)
        unknown = sorted(self._tensors.keys() - names.keys() - _IN_CONFIG)
        if unknown:
            raise UnsupportedModelError(
                f"{self.path} cannot be served: {self.config.model_type} has no place for its tensor {unknown[0]}"
            )
        return names

    def check(self, shape: ModelShape) -> None:
        for name, tensor in self._tensors.items():
            if name in _IN_CONFIG:
                continue
            part = expert_part(self._names[name])
            parameter = self._names[name] if part is None else part.parameter
            known = shape.experts.get(parameter, shape.shapes[parameter])
            found, wanted = _shape(tensor), known if part is None else part.shape(known)
            if found != wanted:
                raise CorruptModelError(
                    f"the tensors in {self.path} do not fit its metadata: {name} is stored as {list(found)}, and the "
                    f"metadata makes it {list(wanted)}"
                )

    @cached_property
    def _quantised(self) -> dict[str, list[gguf.ReaderTensor]]:
        """The tensors that make up each parameter that stays quantised: of a stack of experts, all or none do."""
        tensors: dict[str, list[gguf.ReaderTensor]] = {}
        for name, parameter in self._names.items():
            if name in self._tensors:
                part = expert_part(parameter)
                whole = parameter if part is None else part.parameter
                tensors.setdefault(whole, []).append(self._tensors[name])
        return {name: each for name, each in tensors.items() if all(one.tensor_type in BLOCK_TYPES for one in each)}

    def num_bytes(self, shape: ModelShape, dtype: torch.dtype, *, packed: bool = False) -> int:
        held: dict[str, int] = {}
        for parameter, tensors in self._quantised.items():
            held[parameter] = _num_bytes(tensors, packed=packed and shape.is_product(parameter))
            if packed and shape.output is not None and shape.is_tied_embedding(parameter):
                held[shape.output] = _num_bytes(tensors, packed=True)
        return shape.num_bytes(dtype, held, packed=packed)

    def stored_dtype(self) -> torch.dtype | None:
        kinds = {each.tensor_type for each in self._tensors.values() if len(each.shape) > 1}
        return torch.float32 if kinds == {Kind.F32} else torch.bfloat16

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return gguf_tokenizer(self.path, self._fields)

    def generation(self, mode: GenerationConfigMode) -> dict[str, Any]:
        return {}

    def named_ends(self) -> list[object]:
        stated = self._fields.get("tokenizer.ggml.tokens")
        tokens = stated if isinstance(stated, list) else []
        ends = turn_ends(tokens)
        turns = [number for number, token in enumerate(tokens) if token in ends]
        return [*(token_ids(self._fields, key) for key in ENDS), turns or None]

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)

    def file_states(self) -> list[FileState]:
        return states_of([self.path])

    def load(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        try:
            with BUILDING:
                return build_model(self.config, self._weights(), dtype, attn_implementation)
        except EmberError:
            raise
        except Exception as error:  # the architecture's own code, on unchecked tensors and values
            raise CorruptModelError(
                f"the tensors in {self.path} do not fit its metadata: {reason_of(error)}"
            ) from error

    def _weights(self) -> Iterator[NamedWeight]:
        gemma = self.config.model_type.startswith("gemma")
        for name, parameter in self._names.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                continue
            if expert_part(parameter) is not None:
                yield from _each_expert(parameter, tensor)
                continue
            rows = q_and_k_rows(self.config, name)
            if tensor.tensor_type in BLOCK_TYPES and len(tensor.shape) > 1:
                weight = read_blocks(tensor.data, tensor.tensor_type)
                yield parameter, StoredWeight(weight if rows is None else weight.reordered(rows))
            else:
                values = self._floats(name).view(_shape(tensor))
                if gemma and name.endswith("norm.weight"):
                    values = values - 1  # the file has what is multiplied by, and the model adds one
                yield parameter, values if rows is None else values[rows]

    def _floats(self, name: str) -> torch.Tensor:
        """float32: the values of a tensor, which is empty where the file has none."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return torch.empty(0)
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def _architecture(fields: Mapping[str, Any]) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == fields["general.architecture"])


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """As the model has it. llama.cpp's converter drops the axis of the one row that a shared expert's gate has."""
    shape = tuple(map(int, reversed(tensor.shape)))
    return (1, *shape) if tensor.name.endswith(".ffn_gate_inp_shexp.weight") and len(shape) == 1 else shape


def _each_expert(name: str, tensor: gguf.ReaderTensor) -> Iterator[NamedWeight]:
    """One after the other, of a tensor that has all of them. Unlike other weights, no rows of theirs are reordered."""
    for number, rows in enumerate(tensor.data):
        if tensor.tensor_type in BLOCK_TYPES and rows.ndim == 2:
            yield expert_name(name, number), StoredWeight(read_blocks(rows, tensor.tensor_type))
        else:
            yield expert_name(name, number), torch.from_numpy(gguf.dequantize(rows, tensor.tensor_type).copy())


def _bits(tensors: Sequence[gguf.ReaderTensor]) -> int:
    """In which the codes of a parameter are held that these make up."""
    return max(BLOCK_TYPES[each.tensor_type].bits for each in tensors)


def _num_bytes(tensors: Sequence[gguf.ReaderTensor], *, packed: bool) -> int:
    """Of a parameter that these make up: in the form that holds them all (see `QuantizedWeight.above`)."""
    kinds = [BLOCK_TYPES[each.tensor_type] for each in tensors]
    return affine_bytes(
        sum(prod(map(int, each.shape[1:])) for each in tensors), int(tensors[0].shape[0]),
        bits=_bits(tensors), group=gcd(*(kind.group for kind in kinds)),
        has_offsets=any(kind.has_offsets for kind in kinds), packed=packed,
    )  # fmt: skip


def _is_read(kind: Kind) -> bool:
    return kind in _PLAIN or kind in BLOCK_TYPES
