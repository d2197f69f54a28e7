"""Puts a server's warmup together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emberkv.config import ServeConfig
from emberkv.serving.background import Background
from emberkv.serving.tenancy.tenants import Tenants
from emberkv.serving.warmup.engine_warmer import EngineWarmer
from emberkv.serving.warmup.learned_prompts import LearnedPrompts
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from emberkv.serving.warmup.warmup import Warmup, WarmupSettings

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine


def make_warmup(
    config: ServeConfig,
    engine: "AssembledEngine",
    tenants: Tenants,
    prompts: Sequence[WarmPrompt],
    problems: Sequence[str],
    *,
    on_ready: Callable[[], None],
    background: Background,
) -> Warmup:
    """The warmup of ``prompts``, which watches the engine from now on and is not started yet.

    problems: why others are no prompts. on_ready: see `Warmup`. What use teaches is kept in ``config.cache_dir``.
    Without a prefix cache nothing is warmed.
    """
    warmer = EngineWarmer(engine.loop, tenants, block_size=engine.block_size)
    settings = WarmupSettings(
        config.warmup and config.prefix_cache,
        config.warmup_timeout,
        config.warmup_required,
        engine.hit_unit,
        engine.block_size,
    )
    if not settings.enabled:
        prompts, problems = (), ()
    learned = None
    if config.cache_dir is not None:
        learned = LearnedPrompts(config.cache_dir, engine.root, warmer.chain)
    warmup = Warmup(warmer, settings, prompts, problems=problems, learned=learned, on_ready=on_ready)
    engine.loop.on_update(background.work("warmup").guarded(warmup.on_update))
    return warmup
