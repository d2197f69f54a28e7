"""From a server's settings to what the engine is made of: the loaded model, its kernels, the engine's own settings."""

from collections.abc import Callable, Mapping
from importlib.resources import files

from emberkv.config import ServeConfig
from emberkv.core.policies.fair_shares import Share
from emberkv.engine.assembly import EngineConfig
from emberkv.engine.loader import LoadedModel, load_model
from emberkv.engine.native.choice import find_kernels
from emberkv.engine.native.kernels import Kernels
from emberkv.engine.paged_attention import ATTENTION_NAME
from emberkv.engine.tier_setup import TierConfig

RETAINED_SHARE = 0.25
"""Of the KV pool, what requests and pins may have evicted last."""

Told = Callable[[str], None]
"""Told what is being done, in a line of plain text."""


def load_configured(config: ServeConfig, told: Told) -> tuple[LoadedModel, Kernels | None]:
    """The model of ``config``, or the bundled one, and the kernels that compute it; None leaves it to torch.

    Raises what `load_model` and `find_kernels` raise.
    """
    loaded = load_model(
        config.model or str(files("emberkv") / "demo_model"),
        dtype=config.dtype,
        device=config.device,
        attn_implementation=ATTENTION_NAME,
        progress=told,
    )
    told("compiling the C++ kernels, if they are not yet")
    return loaded, find_kernels(config.kernels, loaded, config.block_size, config.machine_cache)


def engine_config(config: ServeConfig, cache_bytes: int, tiers: TierConfig) -> EngineConfig:
    """cache_bytes: size of the KV pool, which ``config`` may leave open."""
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
    )


def tier_config(config: ServeConfig, shares: Mapping[str, Mapping[str, Share]]) -> TierConfig:
    """shares: see `TierConfig`."""
    return TierConfig(
        ram_bytes=int(config.ram_tier),
        folder=config.cache_dir,
        disk_bytes=int(config.cache_disk),
        shares=shares,
        retain_share=RETAINED_SHARE,
    )
