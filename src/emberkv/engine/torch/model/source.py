"""Where a model is loaded from: what loading asks of any source, and a folder of safetensors, plain or quantised."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emberkv.engine.torch.model.building import NamedWeight, build_model
from emberkv.engine.torch.model.checkpoint import StoredTensors, read_headers, read_json, weight_files
from emberkv.engine.torch.model.expert_weights import ExpertPart, expert_name, expert_part
from emberkv.engine.torch.model.fingerprint import FileState, file_states, quantised_fingerprint, weights_fingerprint
from emberkv.engine.torch.model.generation_config import GenerationConfigMode, read_generation_config
from emberkv.engine.torch.model.inspection import MOST_LAYERS, ModelShape
from emberkv.engine.torch.model.multimodal import TEXT_WEIGHTS, text_config, text_name
from emberkv.engine.torch.quantization.methods import find_method
from emberkv.engine.torch.quantization.on_load import IDENTITY, QuantizeName, RoundingConfig, rounded_bytes
from emberkv.engine.torch.quantization.stored import Method
from emberkv.engine.torch.quantization.weight import Fit
from emberkv.errors import ConfigError, CorruptModelError, EmberError, UnsupportedModelError, reason_of

BUILDING = threading.Lock()
"""transformers sets torch's default dtype, which is one for the process, while it loads a model."""

_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class ModelSource(Protocol):
    """What a model is loaded from. Each method reads what it needs and raises ModelError's kinds.

    path: a folder, or a file that holds all. config: without what it says about quantisation.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def format(self) -> str:
        """How the weights are stored, for people: "bfloat16", "GPTQ, 4 bits in groups of 128"."""
        ...

    @property
    def held(self) -> str | None:
        """What quantised weights are computed with; None where there are none."""
        ...

    def check(self, shape: ModelShape) -> None:
        """Refuse tensors that the config, of which ``shape`` is, wants in another shape, and quantised weights that do
        not make up the model, before memory is taken for them."""
        ...

    def num_bytes(self, shape: ModelShape, dtype: torch.dtype, *, packed: bool = False) -> int:
        """What the weights take in memory, with ``dtype`` for those that are not quantised. shape: see `check`.

        packed: once the kernels have arranged them; else when they have been read.
        """
        ...

    def stored_dtype(self) -> torch.dtype | None:
        """What is best computed with, as far as config and weights say."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    def generation(self, mode: GenerationConfigMode) -> dict[str, Any]:
        """The content of generation_config.json; see `read_generation_config`."""
        ...

    def named_ends(self) -> list[object]:
        """What the config says that ends an answer: ids, lists of ids, or None."""
        ...

    def fingerprint(self) -> str: ...

    def file_states(self) -> list[FileState]: ...

    def load(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        """The model on the CPU, in eval mode."""
        ...


class FolderSource:
    """A folder with config.json and safetensors files. method: of its quantised weights; None: they are plain.

    quantize: to what plain weights are rounded while they are loaded. fit: see `quantise`.
    """

    def __init__(self, folder: Path, quantize: QuantizeName = "none", fit: Fit | None = None) -> None:
        """Raises CorruptModelError, UnsupportedModelError for an architecture or a method that is not known, and
        ConfigError where weights that are quantised already would be rounded again."""
        self.path = folder
        self._quantize = quantize
        self._fit = fit
        self._raw = read_json(folder / "config.json")
        self.config = text_config(_read_config(folder, self._raw))
        try:
            self.method = find_method(self._raw)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{folder} cannot be served: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # of unchecked values
            raise CorruptModelError(
                f"{folder / 'config.json'} does not say how the weights are quantised: {reason_of(error)}"
            ) from error
        if self.method is not None:
            if quantize != "none":
                raise ConfigError(
                    f"--quantize is {quantize}, which rounds plain weights; those in {folder} are {self.method.label}"
                )
            for attribute in ("quantization_config", "quantization"):
                vars(self.config).pop(attribute, None)
        self._files: list[Path] | None = None
        self._stored: StoredTensors | None = None

    @property
    def files(self) -> list[Path]:
        if self._files is None:
            self._files = weight_files(self.path)
        return self._files

    @property
    def stored(self) -> StoredTensors:
        if self._stored is None:
            self._stored = read_headers(self.files)
        return self._stored

    @property
    def format(self) -> str:
        if self.method is not None:
            return self.method.label
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(str(self.stored.dtype), "unknown")

    @property
    def held(self) -> str | None:
        if self.method is None:
            return None if self._quantize == "none" else self._quantize
        return self.method.held

    def check(self, shape: ModelShape) -> None:
        parameters = self._parameters()
        for name, found in parameters.items():
            known, part = _place_of(name, shape)
            wanted = found if known is None else shape.shapes[known]
            if part is not None:
                stack = part.parameter.removesuffix("_bias")
                if self.method is not None and shape.name_of(stack) not in shape.experts:  # not stacked as others' are
                    raise self._experts_refused(self.method)
                wanted = part.shape(shape.experts.get(known or "", wanted))
            if wanted != found:
                raise CorruptModelError(
                    f"the weights in {self.path} do not fit its config.json: {name} is stored as {list(found)}, "
                    f"and the config makes it {list(wanted)}"
                )

        if self.method is not None:
            stored = {_place_of(name, shape)[0] for name in parameters}
            self._require_all(sorted(shape.parameters - shape.shared - stored), self.method)

    def _require_all(self, missing: list[str], method: Method) -> None:
        """Nothing converts the names of a quantised checkpoint, as transformers does those of a plain one."""
        if any(".experts." in name for name in missing):
            raise self._experts_refused(method)
        if missing:
            raise CorruptModelError(
                f"the weights in {self.path} lack {_some(missing)}; the config needs every tensor of the model"
            )

    def _experts_refused(self, method: Method) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path} cannot be served: its weights are {method.label}, in which the experts of "
            f"{self.config.model_type} are not read; the model's plain weights would work, with --quantize int8 or "
            "int4 for all but the experts"
        )

    def num_bytes(self, shape: ModelShape, dtype: torch.dtype, *, packed: bool = False) -> int:
        if self._quantize != "none":
            rounded = rounded_bytes(shape.linears, shape.experts, shape.output, self._quantize, packed=packed)
            return shape.num_bytes(dtype, rounded, packed=packed)
        held: dict[str, int] = {}
        if self.method is not None:
            for layer, parts in self._by_layer(self.stored.shapes)[1].items():
                name, _ = _place_of(_name_in_model(self.method.parameter(layer)), shape)
                if name is not None:
                    *experts, out_features, in_features = self._shape(self.method, layer, parts)
                    as_packed = packed and shape.is_product(name)
                    size = prod(experts) * self.method.num_bytes(out_features, in_features, packed=as_packed)
                    held[name] = held.get(name, 0) + size
                    if packed and shape.output is not None and shape.is_tied_embedding(name):
                        held[shape.output] = self.method.num_bytes(out_features, in_features, packed=True)
        return shape.num_bytes(dtype, held, packed=packed)

    def stored_dtype(self) -> torch.dtype | None:
        stated = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else None
        if stated is None:
            stated = _STORED_DTYPES.get(str(self.stored.dtype))
        # Activations in float16 are slow on a CPU, and what bfloat16 rounds is little beside what 8 or 4 bits did.
        return torch.bfloat16 if self.method is not None and stated is not torch.float32 else stated

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return read_tokenizer(self.path)

    def generation(self, mode: GenerationConfigMode) -> dict[str, Any]:
        return read_generation_config(self.path, mode)

    def named_ends(self) -> list[object]:
        text_config = self._raw.get("text_config")
        return [
            self._raw.get("eos_token_id"),
            text_config.get("eos_token_id") if isinstance(text_config, dict) else None,
        ]

    def fingerprint(self) -> str:
        stored = weights_fingerprint(self.path)
        return stored if self._quantize == "none" else quantised_fingerprint(stored, f"{self._quantize}, {IDENTITY}")

    def file_states(self) -> list[FileState]:
        return file_states(self.path)

    def load(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        try:
            with BUILDING:
                if self.method is not None:
                    return build_model(self.config, self.weights(self.method), dtype, attn_implementation)
                return self._load_plain(dtype, attn_implementation)
        except EmberError:
            raise
        except Exception as error:  # the architecture's own code, on unchecked tensors and values
            raise CorruptModelError(
                f"the weights in {self.path} do not fit its config.json: {reason_of(error)}"
            ) from error

    def _load_plain(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        auto_class: Any = AutoModelForCausalLM  # typed as if it returned the model alone
        generation_config: Any = GenerationConfig  # untyped
        model: PreTrainedModel
        rounding = None if self._quantize == "none" else RoundingConfig(self._quantize, fit=self._fit)
        try:
            model, report = auto_class.from_pretrained(
                self.path,
                config=self.config,
                generation_config=generation_config(),  # so that the file is read in one place only
                dtype=dtype,
                key_mapping=TEXT_WEIGHTS,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                quantization_config=rounding,
            )
        except Exception as error:  # the architecture's own code
            if rounding is not None and rounding.problem:
                raise CorruptModelError(f"the weights in {self.path} cannot be rounded: {rounding.problem}") from error
            raise
        _require_complete(self.path, report)
        unread = sorted(name for name, weight in model.named_parameters(remove_duplicate=False) if weight.is_meta)
        if unread:
            raise UnsupportedModelError(
                f"{self.path} cannot be loaded with --quantize {self._quantize}: {_some(unread)} share the values of "
                "weights that are rounded; load it without --quantize"
            )
        return model

    def weights(self, method: Method | None) -> Iterator[NamedWeight]:
        """Each parameter in the order of the files, a layer at a time; quantised ones by ``method``."""
        with ExitStack() as stack:
            holders: dict[str, Any] = {}
            for path in self.files:
                tensors = stack.enter_context(safe_open(path, framework="pt"))
                holders.update(dict.fromkeys(tensors.keys(), tensors))
            plain, quantised = self._by_layer(holders)
            for name in plain:
                yield _name_in_model(name), holders[name].get_tensor(name)
            for layer, parts in quantised.items():
                if method is None:
                    continue
                stored = {part: holders[name].get_tensor(name) for part, name in parts.items()}
                name = _name_in_model(method.parameter(layer))
                part = expert_part(name)
                if part is None or part.number is not None:
                    yield name, method.read(layer, stored)
                    continue
                for number in range(min(map(len, stored.values()))):
                    one = {each: tensor[number] for each, tensor in stored.items()}
                    yield expert_name(name, number), method.read(layer, one)

    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that the files hold, as the model has it."""
        plain, quantised = self._by_layer(self.stored.shapes)
        found = {_name_in_model(name): self.stored.shapes[name] for name in plain}
        if self.method is not None:
            for layer, parts in quantised.items():
                found[_name_in_model(self.method.parameter(layer))] = self._shape(self.method, layer, parts)
        return found

    def _shape(self, method: Method, layer: str, parts: Mapping[str, str]) -> tuple[int, ...]:
        shapes = {part: self.stored.shapes[name] for part, name in parts.items()}
        try:
            return method.shape(layer, shapes)
        except (KeyError, ValueError) as error:  # a part that is not there, or has another number of axes
            raise CorruptModelError(
                f"the layer {layer} in {self.path} is not stored as {method.label}: it has "
                f"{', '.join(f'{part} {list(shape)}' for part, shape in sorted(shapes.items()))}"
            ) from error

    def _by_layer(self, names: Mapping[str, object]) -> tuple[list[str], dict[str, dict[str, str]]]:
        """The names of plain tensors; and of each quantised layer's, by part."""
        if self.method is None:
            return list(names), {}
        layers: dict[str, dict[str, str]] = {}
        for name in names:
            split = self.method.split(name)
            if split is not None:
                layers.setdefault(split[0], {})[split[1]] = name
        quantised = {layer: parts for layer, parts in layers.items() if self.method.keys & parts.keys()}
        taken = {name for parts in quantised.values() for name in parts.values()}
        return [name for name in names if name not in taken], quantised


def _name_in_model(stored: str) -> str:
    """The name that the model's code gives a tensor of a quantised checkpoint, whose names nothing converts."""
    return text_name(stored).replace(".block_sparse_moe.", ".mlp.")


def _place_of(name: str, shape: ModelShape) -> tuple[str | None, ExpertPart | None]:
    """The parameter that a stored weight is, or which part of one; None: the model has none for it."""
    known, part = shape.name_of(name), expert_part(name)
    if known is not None or part is None:
        return known, None
    known = shape.name_of(part.parameter)
    return known, None if known is None else part


def _read_config(folder: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    path, model_type = folder / "config.json", raw.get("model_type")
    if not isinstance(model_type, str):
        raise CorruptModelError(f"{path} names no model_type; it must be one of transformers' model types")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{model_type} cannot be served: this version of transformers does not know it, and code that comes "
            "with a model is never run"
        )
    for each in (raw, raw.get("text_config")):
        layers = each.get("num_hidden_layers") if isinstance(each, Mapping) else None
        if isinstance(layers, int) and layers > MOST_LAYERS:  # some configs make lists of that length
            raise CorruptModelError(f"{path} gives {layers} layers; at most {MOST_LAYERS} are built")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the architecture's own code, on unchecked values
        raise CorruptModelError(f"{path} is no usable {model_type} config: {reason_of(error)}") from error
    return config


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the files in a model's folder that make up its tokenizer. Raises CorruptModelError without any."""
    found = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise CorruptModelError(f"{folder} has no tokenizer; it must hold one of {', '.join(_TOKENIZER_FILES)}")
    return found


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder. Raises CorruptModelError, UnsupportedModelError."""
    found = tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        if found == ["tokenizer.model"]:
            raise UnsupportedModelError(
                f"{folder} has its tokenizer as a SentencePiece model only (tokenizer.model); it must hold "
                "tokenizer.json, which transformers' save_pretrained writes where sentencepiece is installed"
            ) from error
        raise CorruptModelError(f"the tokenizer in {folder} cannot be read: {reason_of(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(
            f"{folder} has a {type(tokenizer).__name__}; accepted are tokenizers of the tokenizers library"
        )
    # Classes that make their backend themselves keep what they make it of: 56 MiB for 152,000 tokens.
    for part in ("_vocab", "_merges"):
        vars(tokenizer).pop(part, None)
    return tokenizer


def _require_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers after a warning."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise CorruptModelError(
            f"the weights in {folder} lack {_some(missing)}; the config needs every tensor of the model"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
