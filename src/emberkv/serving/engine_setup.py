"""The engine that a server's settings describe, as the values that the engine takes."""

from collections.abc import Mapping

from emberkv.config import ServeConfig, TierSettings
from emberkv.core.policies.fair_shares import Share
from emberkv.engine.assembly import EngineConfig
from emberkv.engine.torch.assembly import CacheSizes, ModelOptions
from emberkv.serving.tenancy import one_key
from emberkv.tiers.kinds import TierConfig, TierSpec, configured_tiers
from emberkv.tiers.remote.server import ServerAddress

RETAINED_SHARE = 0.25
"""Of the KV pool, what requests and pins may have evicted last."""


def model_options(config: ServeConfig) -> ModelOptions:
    """Which model is loaded, and what computes it."""
    return ModelOptions(
        model=config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
        device=config.device,
        chat_template=config.chat_template,
        generation_config=config.generation_config,
        kernels=config.kernels,
        block_size=config.block_size,
        machine_cache=config.machine_cache,
    )


def cache_sizes(config: ServeConfig) -> CacheSizes:
    """Bytes of the KV pool, where they are given, and of the RAM tier."""
    return CacheSizes(
        None if config.cache_ram is None else int(config.cache_ram),
        int(config.ram_tier),
        config.block_size if _gives_block_size(config) else None,
    )


def engine_config(
    config: ServeConfig, cache_bytes: int, tiers: TierConfig, weights: Mapping[str, float] | None = None
) -> EngineConfig:
    """The engine's own settings. cache_bytes: size of the KV pool. weights: of tenants (`SchedulerConfig`)."""
    return EngineConfig(
        cache_bytes=cache_bytes,
        block_size=config.block_size,
        prefill_chunk=config.prefill_chunk,
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        eviction=config.eviction,
        exact=config.exact,
        prefix_cache=config.prefix_cache,
        tiers=tiers,
        weights=weights or {},
        self_checks=config.machine_cache if config.self_check == "auto" else None,
        grow_blocks=not _gives_block_size(config),
    )


def _gives_block_size(config: ServeConfig) -> bool:
    """Without it, the model's own default holds."""
    return "block_size" in config.model_fields_set


def tier_config(config: TierSettings, shares: Mapping[str, Mapping[str, Share]]) -> TierConfig:
    """The tiers below the KV pool. shares: see `TierConfig`."""
    return TierConfig(tier_specs(config), shares=shares, retain_share=RETAINED_SHARE)


def tier_specs(config: TierSettings) -> tuple[TierSpec, ...]:
    """The tiers that the settings name. Raises ConfigError for a password's file that does not hold one."""
    address = None
    if config.remote_tier is not None:
        option, file = "--remote-tier-password-file", config.remote_tier_password_file
        address = ServerAddress(config.remote_tier, one_key(option, config.remote_tier_password, file))
    return configured_tiers(
        ram_bytes=int(config.ram_tier),
        folder=config.cache_dir,
        disk_bytes=int(config.cache_disk),
        shm_bytes=int(config.shm_tier),
        server=address,
        server_bytes=int(config.remote_tier_bytes),
        ttl_seconds=config.remote_tier_ttl,
    )
