"""From a server's settings to what the engine is made of: the loaded model, its kernels, the engine's own settings."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files

import torch

from emberkv.config import ServeConfig
from emberkv.core.policies.fair_shares import Share
from emberkv.engine.assembly import EngineConfig
from emberkv.engine.tier_setup import TierConfig
from emberkv.engine.torch.attention.paged_attention import ATTENTION_NAME
from emberkv.engine.torch.memory import free_memory, gib
from emberkv.engine.torch.model.checkpoint import fetch_from_hub
from emberkv.engine.torch.model.loader import LoadedModel, choose_device, load_model
from emberkv.engine.torch.native.choice import find_kernels
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.errors import ConfigError
from emberkv.tiers.kinds import configured_tiers

DEFAULT_CONTEXTS = 8
"""Full contexts that the KV pool has room for at most, unless its size is given."""

RETAINED_SHARE = 0.25
"""Of the KV pool, what requests and pins may have evicted last."""

ProgressCallback = Callable[[str], None]
"""Called with what is being done, a line of plain text."""


def load_configured(
    config: ServeConfig, on_progress: ProgressCallback, *, shows_downloads: bool = False
) -> tuple[LoadedModel, Kernels | None]:
    """The model of ``config``, or the bundled one, and the kernels that compute it; None leaves it to torch.

    shows_downloads: ``on_progress`` is called several times a second while a model is downloaded.

    Raises what `check_sizes`, `load_model` and `find_kernels` raise.
    """
    check_sizes(config, choose_device(config.device))
    loaded = load_model(
        str(files("emberkv") / "demo_model") if config.model is None else config.model,
        dtype=config.dtype,
        device=config.device,
        attn_implementation=ATTENTION_NAME,
        chat_template=config.chat_template,
        generation_config=config.generation_config,
        progress=on_progress,
        fetch=partial(fetch_from_hub, progress=on_progress) if shows_downloads else fetch_from_hub,
    )
    kernels = find_kernels(
        config.kernels,
        loaded,
        config.block_size,
        config.machine_cache,
        on_compile=lambda: on_progress("compiling the C++ kernels, once for this machine"),
    )
    return loaded, kernels


def pool_bytes(config: ServeConfig, loaded: LoadedModel) -> int:
    """Size of the KV pool: as given, else a quarter of the free memory, of which a small model takes less.

    Raises ConfigError when what is given does not fit the memory that is left now.
    """
    check_sizes(config, loaded.device)
    if config.cache_ram is not None:
        return int(config.cache_ram)
    useful = DEFAULT_CONTEXTS * loaded.context_length * loaded.geometry.bytes_per_token(loaded.dtypes.kv)
    return min(free_memory(loaded.device) // 4, useful)


def check_sizes(config: ServeConfig, device: torch.device) -> None:
    """Raises ConfigError for a KV pool or a RAM tier that the free memory cannot hold."""
    pool, free = int(config.cache_ram or 0), free_memory(device)
    if pool > free:
        raise ConfigError(f"--cache-ram is {gib(pool)}; {gib(free)} are free")
    left = free - pool if device.type == "cpu" else free_memory(torch.device("cpu"))
    if config.ram_tier > left:
        beside = " beside --cache-ram" if pool and device.type == "cpu" else ""
        raise ConfigError(f"--ram-tier is {gib(config.ram_tier)}; {gib(left)} are free{beside}")


def engine_config(
    config: ServeConfig, cache_bytes: int, tiers: TierConfig, weights: Mapping[str, float] | None = None
) -> EngineConfig:
    """cache_bytes: size of the KV pool, which ``config`` may leave open. weights: of tenants."""
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
    )


def tier_config(config: ServeConfig, shares: Mapping[str, Mapping[str, Share]]) -> TierConfig:
    """shares: see `TierConfig`."""
    return TierConfig(
        configured_tiers(ram_bytes=int(config.ram_tier), folder=config.cache_dir, disk_bytes=int(config.cache_disk)),
        shares=shares,
        retain_share=RETAINED_SHARE,
    )
