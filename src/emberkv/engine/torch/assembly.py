"""Builds an engine: loads a model as options say, finds room for its KV pool, and assembles what stands above it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emberkv.core.block_pool import BlockCost
from emberkv.core.hashing import root_hash
from emberkv.core.policies.eviction import EntryCost
from emberkv.defaults import DEFAULT_BLOCK_SIZE, machine_cache_folder
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.constraints import ConstraintCompiler
from emberkv.engine.request import ModelLimits
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.checkpoint import fetch_from_hub
from emberkv.engine.torch.model.loader import KVDTypeName, LoadedModel, choose_device, free_memory, gib, load_model
from emberkv.engine.torch.namespace import namespace_of
from emberkv.engine.torch.native.experts import RowwiseWeight
from emberkv.engine.torch.native.kernels import Kernels, find_kernels
from emberkv.engine.torch.passed_checks import PassedChecks, check_key
from emberkv.engine.torch.quantization.layers import quantized_weights
from emberkv.engine.torch.quantization.on_load import QuantizeName
from emberkv.engine.torch.quantization.weight import Fit, QuantizedWeight
from emberkv.engine.torch.sampling import Sampler
from emberkv.errors import ConfigError, EmberError, KernelsError, UnsupportedModelError, reason_of
from emberkv.heap import return_freed_memory

_log = logging.getLogger(__name__)


def assemble(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    kernels: Kernels | None = None,
    public_prefixes: Iterable[Sequence[int]] = (),
    sampler: Sampler | None = None,
    on_crash: Callable[[Exception], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> AssembledEngine:
    """An engine whose thread is not started yet. kernels, sampler, progress: see `TorchEngine`.

    public_prefixes, on_crash: see `assemble_around`, which raises what this raises, beside
    UnsupportedModelError when the paged attention does not reproduce the model's own.
    """
    if config.grow_blocks:
        grown = max(config.block_size, loaded.geometry.default_block_size(loaded.dtypes.kv))
        config = replace(config, block_size=grown)
    block_cost = recompute_cost(loaded, config.block_size)  # before packing takes weights out of the parameters
    executor = checked_executor(loaded, config, kernels=kernels, sampler=sampler, progress=progress)
    config = replace(config, prefill_chunk=executor.prefill_chunk)
    root = root_hash(loaded.fingerprint, config.block_size)
    return assemble_around(
        executor,
        config,
        limits=ModelLimits(loaded.context_length, loaded.geometry.vocab_size, loaded.eos_token_ids),
        root=root,
        namespace=namespace_of(executor, root).digest(),
        block_cost=block_cost,
        public_prefixes=public_prefixes,
        constraints=ConstraintCompiler(
            loaded.tokenizer, vocab_size=loaded.geometry.vocab_size, eos_token_ids=loaded.eos_token_ids
        ),
        on_crash=on_crash,
    )


def checked_executor(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    kernels: Kernels | None = None,
    sampler: Sampler | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> TorchEngine:
    """An executor whose logits are the model's own. Raises ConfigError, and UnsupportedModelError if they are not.

    Whether they are, and which bits are equal, is found by a self-check, or was found by the same one before.
    """
    passed = None if config.self_checks is None else PassedChecks(config.self_checks)
    key = "" if passed is None else _check_key(loaded, config, kernels)
    known = None if passed is None else passed.find(key)
    if known is not None:
        progress("self-check: passed before, with the same weights, machine and versions")
    try:
        executor = TorchEngine(
            loaded,
            cache_bytes=config.cache_bytes,
            block_size=config.block_size,
            prefill_chunk=config.prefill_chunk,
            kernels=kernels,
            sampler=sampler,
            progress=progress,
            known=known,
        )
        executor.check_against_plain_forward()
    except EmberError:
        raise
    except Exception as error:  # the architecture's own code, in a first forward pass
        _log.debug("the first forward pass failed", exc_info=True)
        raise UnsupportedModelError(
            f"{loaded.name} cannot be served: a forward pass of {type(loaded.model).__name__} fails "
            f"({reason_of(error)})"
        ) from error
    if passed is not None and known is None:
        passed.keep(key, executor.findings)
    return_freed_memory()
    return executor


def _check_key(loaded: LoadedModel, config: EngineConfig, kernels: Kernels | None) -> str:
    return check_key(
        loaded,
        kernels,
        cache_bytes=config.cache_bytes,
        block_size=config.block_size,
        prefill_chunk=config.prefill_chunk,
    )


def recompute_cost(loaded: LoadedModel, block_size: int) -> BlockCost:
    """What a block costs to compute again, in floating-point operations, against its bytes.

    Two operations per weight and token, and four per query channel and key seen: later blocks cost more.
    """
    geometry = loaded.geometry
    linear = 2.0 * weight_count(loaded.model) * block_size
    per_key = 4.0 * sum(shape.heads * shape.dim for shape in geometry.head_shapes()) * block_size
    size = float(geometry.block_bytes(loaded.dtypes.kv, block_size))
    return lambda position: EntryCost(size, linear + per_key * position * block_size)


def weight_count(model: nn.Module) -> int:
    """Values of all weights, quantised or not. Call it before the engine replaces any layers."""
    quantised = sum(each.in_features * each.out_features for each in quantized_weights(model))
    return quantised + sum(parameter.numel() for parameter in model.parameters())


_HOLDERS = (Tensor, QuantizedWeight, list, tuple)
"""Kinds of attributes in which layers hold weights besides parameters and buffers."""


def resident_bytes(model: nn.Module) -> int:
    """Of all weights as the model's layers hold them now: packed, quantised or plain, and what several share once."""
    found: dict[int, int] = {}
    waiting: list[object] = list(model.modules())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            else:  # oneDNN's, whose storage cannot be asked
                found[id(value)] = value.nbytes
        if isinstance(value, QuantizedWeight):
            waiting += (value.codes, value.scales, value.offsets)
        elif isinstance(value, RowwiseWeight):
            waiting += value.layers.values()
        elif isinstance(value, nn.Module):
            waiting += (*value.parameters(recurse=False), *value.buffers(recurse=False))
            waiting += (each for each in vars(value).values() if isinstance(each, _HOLDERS))
        elif isinstance(value, list | tuple):
            waiting += (each for each in value if isinstance(each, (nn.Module, *_HOLDERS)))
    return sum(found.values())


DEFAULT_CONTEXTS = 8
"""Full contexts that the KV pool has room for at most, unless its size is given."""

ProgressCallback = Callable[[str], None]
"""Called with what is being done, in a line of plain text."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model is loaded, and what computes it.

    model: a folder or a hub id; None: the bundled demonstration model. dtype: of the weights. kv_dtype: of the KV pool;
    "auto": the activations'. device: "auto", or a name that torch has.
    chat_template: the name of one of the model's templates, or a file with one; None: the model's own.
    generation_config: "auto" takes the model's generation_config.json as defaults of sampling; "ignore" does not.
    kernels: what computes on a CPU: "native", "torch" or "auto" (see `find_kernels`). block_size: tokens of a KV block.
    machine_cache: a folder for the compiled kernels.
    """

    model: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: QuantizeName = "none"
    kv_dtype: KVDTypeName = "auto"
    device: str = "auto"
    chat_template: str | None = None
    generation_config: Literal["auto", "ignore"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    block_size: int = DEFAULT_BLOCK_SIZE
    machine_cache: Path = field(default_factory=machine_cache_folder)


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Bytes of the KV pool and of the RAM tier below it; None leaves the pool's size to the free memory.

    block_size: tokens of a KV block; None: the model's own default.
    """

    pool: int | None = None
    ram_tier: int = 0
    block_size: int | None = None

    def check(self, device: torch.device) -> None:
        """Raises ConfigError for a KV pool on ``device``, or a RAM tier, that the free memory cannot hold."""
        pool, free = self.pool or 0, free_memory(device)
        if pool > free:
            raise ConfigError(f"--cache-ram is {gib(pool)}; {gib(free)} are free")
        left = free - pool if device.type == "cpu" else free_memory(torch.device("cpu"))
        if self.ram_tier > left:
            beside = " beside --cache-ram" if pool and device.type == "cpu" else ""
            raise ConfigError(f"--ram-tier is {gib(self.ram_tier)}; {gib(left)} are free{beside}")

    def pool_bytes(self, loaded: LoadedModel) -> int:
        """Size of the KV pool: as given, else a quarter of the free memory, of which a small model takes less.

        Raises ConfigError when what is given does not fit the memory that is left now.
        """
        self.check(loaded.device)
        if self.pool is not None:
            return self.pool
        size = self.block_size or loaded.geometry.default_block_size(loaded.dtypes.kv)
        useful = (
            DEFAULT_CONTEXTS * -(-loaded.context_length // size) * loaded.geometry.block_bytes(loaded.dtypes.kv, size)
        )
        return min(free_memory(loaded.device) // 4, useful)


def load_configured(
    options: ModelOptions, sizes: CacheSizes, on_progress: ProgressCallback, *, shows_downloads: bool = False
) -> tuple[LoadedModel, Kernels | None]:
    """The model of ``options``, and the kernels that compute it; None leaves it to torch.

    sizes: checked before anything is loaded. shows_downloads: ``on_progress`` is called several times a second while a
    model is downloaded.

    Raises what `CacheSizes.check`, `load_model` and `find_kernels` raise.
    """
    sizes.check(choose_device(options.device))
    compiling = partial(on_progress, "compiling the C++ kernels, once for this machine")
    loaded = load_model(
        str(files("emberkv") / "demo_model") if options.model is None else options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        kv_dtype=options.kv_dtype,
        fit=_native_fit(options, compiling),
        device=options.device,
        attn_implementation=ATTENTION_NAME,
        chat_template=options.chat_template,
        generation_config=options.generation_config,
        progress=on_progress,
        fetch=partial(fetch_from_hub, progress=on_progress) if shows_downloads else fetch_from_hub,
    )
    kernels = find_kernels(
        options.kernels,
        loaded,
        options.block_size,
        options.machine_cache,
        on_compile=compiling,
    )
    return loaded, kernels


def _native_fit(options: ModelOptions, on_compile: Callable[[], None]) -> Fit | None:
    """What rounds weights to 4 bits by the kernels; None leaves it to torch, which gives the same in more time."""
    if options.quantize != "int4" or options.kernels == "torch":
        return None
    try:
        return Kernels.built(options.machine_cache, on_compile).fitted
    except KernelsError as error:
        _log.warning("torch rounds the weights in place of the C++ kernels, which takes longer: %s", error)
        return None
