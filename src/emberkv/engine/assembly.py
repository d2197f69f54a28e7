"""Puts an engine together: model, KV pool, block pool, scheduler, thread."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from emberkv.core.block_pool import BlockPool, BlockWeight
from emberkv.core.eviction import make_policy
from emberkv.core.eviction_policy import Weight
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.engine.limits import ModelLimits
from emberkv.engine.loader import LoadedModel
from emberkv.engine.loop import EngineLoop
from emberkv.engine.torch_engine import TorchEngine


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """cache_bytes: size of the KV pool. See `emberkv.config.ServeConfig` for the rest."""

    cache_bytes: int
    block_size: int
    prefill_chunk: int
    max_step_tokens: int = 256
    max_running: int = 64
    eviction: str = "lru"
    exact: bool = False
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class AssembledEngine:
    loop: EngineLoop
    executor: TorchEngine
    scheduler: Scheduler


def assemble(
    loaded: LoadedModel, config: EngineConfig, *, on_crash: Callable[[Exception], None] = lambda _: None
) -> AssembledEngine:
    """An engine whose thread is not started yet. on_crash: see `EngineLoop`.

    Raises ConfigError when a setting cannot work, UnsupportedModelError when the paged attention does not reproduce
    the model's own.
    """
    weight = recompute_weight(loaded, config.block_size)  # before packing takes weights out of the parameters
    executor = TorchEngine(
        loaded,
        cache_bytes=config.cache_bytes,
        block_size=config.block_size,
        prefill_chunk=config.prefill_chunk,
    )
    executor.check_against_plain_forward()
    pool = BlockPool(
        executor.pool.num_blocks,
        config.block_size,
        policy=make_policy(config.eviction),
        weight=weight,
    )
    cache = PrefixCache(pool, alignment=executor.alignment, exact=config.exact, enabled=config.prefix_cache)
    scheduler = Scheduler(cache, SchedulerConfig(config.prefill_chunk, config.max_step_tokens, config.max_running))
    limits = ModelLimits(loaded.context_length, loaded.geometry.vocab_size, loaded.eos_token_ids)
    loop = EngineLoop(executor, scheduler, limits, on_crash=on_crash)
    return AssembledEngine(loop, executor, scheduler)


def recompute_weight(loaded: LoadedModel, block_size: int) -> BlockWeight:
    """What a block costs to compute again, in floating-point operations, against its bytes.

    Two operations per weight and token, and four per query channel and key seen: later blocks cost more.
    """
    geometry = loaded.geometry
    linear = 2.0 * sum(parameter.numel() for parameter in loaded.model.parameters()) * block_size
    per_key = 4.0 * geometry.num_layers * geometry.num_heads * geometry.head_dim * block_size
    size = float(geometry.bytes_per_token(loaded.dtype) * block_size)
    return lambda position: Weight(size, linear + per_key * position * block_size)


def free_memory(device: torch.device) -> int:
    """Bytes free for allocation where ``device`` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
