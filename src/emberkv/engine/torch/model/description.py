"""What a model is and what it takes, read from its config and the headers of its weights, before any are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from emberkv.defaults import DEFAULT_BLOCK_SIZE
from emberkv.engine.torch.model.checkpoint import Fetch, fetch_from_hub, find_model, read_json
from emberkv.engine.torch.model.inspection import ModelShape, inspect_model
from emberkv.engine.torch.model.loader import (
    DTypeName,
    choose_device,
    choose_dtype,
    dtype_name,
    free_memory,
    open_source,
)
from emberkv.engine.torch.model.source import FolderSource, ModelSource, tokenizer_files
from emberkv.errors import UnsupportedModelError

RUNTIME_BYTES = 512 * 2**20
"""What the process takes beside weights and KV pool, about."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model before it is loaded.

    name: as given. architecture: transformers' type. stored_as: how its files hold the weights. refusal: why it cannot
    be served, and what could; None: it can. free_bytes: of the memory of ``device``. Of a model that is refused, the
    rest may be unknown: None.

    parameters: how many. computed_as: the type of activations and KV, and of weights that are not quantised; held: what
    becomes of quantised ones. weight_bytes: in memory, as a server's layers hold them on ``device``.
    kv_bytes_per_token: over all layers, with a token's share of its block's other state, which is
    state_bytes_per_block. block_size: tokens of a block, unless ``--block-size`` says it. int8_kv_bytes_per_token: with
    ``--kv-dtype int8``; None where that is refused. context: the most tokens of a prompt and its answer;
    stated_context: what the config states. reuse: which tokens a hit can reuse, how exactly.
    """

    name: str
    architecture: str
    stored_as: str
    device: str
    free_bytes: int
    refusal: str | None
    parameters: int | None = None
    layers: int | None = None
    computed_as: str | None = None
    held: str | None = None
    weight_bytes: int | None = None
    quantised_bytes: dict[str, int] | None = None
    kv_bytes_per_token: int | None = None
    int8_kv_bytes_per_token: int | None = None
    state_bytes_per_block: int = 0
    block_size: int = DEFAULT_BLOCK_SIZE
    context: int | None = None
    stated_context: int | None = None
    reuse: str | None = None

    @property
    def fitting_tokens(self) -> int | None:
        """Tokens whose KV state fits into the free memory beside the weights."""
        if self.weight_bytes is None or not self.kv_bytes_per_token:
            return None
        return max(0, self.free_bytes - self.weight_bytes - RUNTIME_BYTES) // self.kv_bytes_per_token


def describe_model(
    name_or_path: str, *, dtype: DTypeName = "auto", device: str = "auto", fetch: Fetch = fetch_from_hub
) -> ModelDescription:
    """Describe a model; one that is refused, too.

    Raises ModelNotFoundError, CorruptModelError, and ConfigError for a dtype or a device that cannot be used.
    """
    target = choose_device(device)
    path = find_model(name_or_path, fetch)
    free = free_memory(target)
    try:
        source = open_source(path)
        shape = inspect_model(source.config)
        source.check(shape)
        _check_tokenizer(source)
    except UnsupportedModelError as error:
        return ModelDescription(name_or_path, _stated_architecture(path), "unknown", str(target), free, str(error))
    chosen = choose_dtype(dtype, source.stored_dtype(), target)
    geometry = shape.geometry
    block_size = geometry.default_block_size(chosen)
    block_bytes = geometry.block_bytes(chosen, block_size)
    return ModelDescription(
        name_or_path,
        source.config.model_type,
        source.format,
        str(target),
        free,
        None,
        parameters=shape.num_parameters,
        layers=geometry.model_layers,
        computed_as=dtype_name(chosen),
        held=source.held,
        weight_bytes=source.num_bytes(shape, chosen, packed=target.type == "cpu"),
        quantised_bytes=_quantised(source, shape, chosen),
        kv_bytes_per_token=-(-block_bytes // block_size),
        int8_kv_bytes_per_token=(
            None if geometry.odd_head_dim() or geometry.states else geometry.bytes_per_token(torch.int8)
        ),
        state_bytes_per_block=block_bytes - geometry.bytes_per_token(chosen) * block_size,
        block_size=block_size,
        context=geometry.context_length,
        stated_context=geometry.stated_context,
        reuse=_reuse(chosen, target, shape),
    )


def _check_tokenizer(source: ModelSource) -> None:
    """Raise what loading would, but for the contents of a folder's tokenizer, which take long to read."""
    if source.path.is_dir():
        tokenizer_files(source.path)
    else:
        source.tokenizer()


def _stated_architecture(path: Path) -> str:
    if path.is_file():
        return "a GGUF file"
    return str(read_json(path / "config.json").get("model_type", "unknown"))


def _quantised(source: ModelSource, shape: ModelShape, dtype: torch.dtype) -> dict[str, int]:
    """What the weights take with ``--quantize int8`` and ``int4``, by its value; {} where it cannot be given."""
    if source.held is not None or not source.path.is_dir():
        return {}
    widths: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
    return {width: FolderSource(source.path, width).num_bytes(shape, dtype, packed=True) for width in widths}


def _reuse(dtype: torch.dtype, device: torch.device, shape: ModelShape) -> str:
    where = "at whole blocks and checkpoints" if shape.geometry.states else "at any token"
    if shape.experts:
        where += " (at whole prefill chunks if the kernels do not compute its experts)"
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return f"{where}, equal to a cold run to the last bit, by the C++ kernels"
    return "at whole tiles or prefill chunks, equal to a cold run to the last bit, as the start's self-check finds"
