"""Puts an engine together over a loaded model: its executor, checked, and all that stands above it."""

import logging
from collections.abc import Callable, Iterable, Sequence

from emberkv.core.block_pool import BlockCost
from emberkv.core.hashing import root_hash
from emberkv.core.policies.eviction_policy import EntryCost
from emberkv.engine.assembly import AssembledEngine, EngineConfig, assemble_around
from emberkv.engine.limits import ModelLimits
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.namespace import namespace_of
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.sampling import Sampler
from emberkv.errors import EmberError, UnsupportedModelError, reason_of
from emberkv.tiers.worker import EvictionHook

_log = logging.getLogger(__name__)


def assemble(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    kernels: Kernels | None = None,
    public_prefixes: Iterable[Sequence[int]] = (),
    sampler: Sampler | None = None,
    on_crash: Callable[[Exception], None] = lambda _: None,
    on_evicted: EvictionHook = lambda _tier, _hashes: None,
    progress: Callable[[str], None] = lambda _: None,
) -> AssembledEngine:
    """An engine whose thread is not started yet. kernels, sampler, progress: see `TorchEngine`.

    public_prefixes, on_crash, on_evicted: see `assemble_around`, which raises what this raises, beside
    UnsupportedModelError when the paged attention does not reproduce the model's own.
    """
    block_cost = recompute_cost(loaded, config.block_size)  # before packing takes weights out of the parameters
    executor = checked_executor(loaded, config, kernels=kernels, sampler=sampler, progress=progress)
    root = root_hash(loaded.fingerprint, config.block_size)
    return assemble_around(
        executor,
        config,
        limits=ModelLimits(loaded.context_length, loaded.geometry.vocab_size, loaded.eos_token_ids),
        root=root,
        namespace=namespace_of(executor, root).digest(),
        block_cost=block_cost,
        public_prefixes=public_prefixes,
        on_crash=on_crash,
        on_evicted=on_evicted,
    )


def checked_executor(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    kernels: Kernels | None = None,
    sampler: Sampler | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> TorchEngine:
    """An executor whose logits are the model's own. Raises ConfigError, and UnsupportedModelError if they are not."""
    try:
        executor = TorchEngine(
            loaded,
            cache_bytes=config.cache_bytes,
            block_size=config.block_size,
            prefill_chunk=config.prefill_chunk,
            kernels=kernels,
            sampler=sampler,
            progress=progress,
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
    return executor


def recompute_cost(loaded: LoadedModel, block_size: int) -> BlockCost:
    """What a block costs to compute again, in floating-point operations, against its bytes.

    Two operations per weight and token, and four per query channel and key seen: later blocks cost more.
    """
    geometry = loaded.geometry
    linear = 2.0 * sum(parameter.numel() for parameter in loaded.model.parameters()) * block_size
    per_key = 4.0 * geometry.num_layers * geometry.num_heads * geometry.head_dim * block_size
    size = float(geometry.bytes_per_token(loaded.dtypes.kv) * block_size)
    return lambda position: EntryCost(size, linear + per_key * position * block_size)
