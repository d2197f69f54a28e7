"""Puts an engine together: model, KV pool, block pool, scheduler, thread."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from emberkv.core.block_pool import BlockCost, BlockPool
from emberkv.core.hashing import BlockHash, root_hash
from emberkv.core.policies.eviction_policy import EntryCost
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.public_prefixes import PublicPrefixes
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.engine.block_transfer import BlockTransfer
from emberkv.engine.commands import CacheControl
from emberkv.engine.limits import ModelLimits
from emberkv.engine.loop import EngineLoop
from emberkv.engine.tier_link import TierLink
from emberkv.engine.tier_setup import TierConfig, open_tiers
from emberkv.engine.torch.engine import TorchEngine
from emberkv.engine.torch.model.loader import LoadedModel
from emberkv.engine.torch.namespace import namespace_of
from emberkv.engine.torch.native.kernels import Kernels
from emberkv.engine.torch.sampling import Sampler
from emberkv.errors import EmberError, UnsupportedModelError, reason_of
from emberkv.tiers.manager import TierManager
from emberkv.tiers.worker import EvictionHook

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """cache_bytes: size of the KV pool. tiers: what lies below it. weights: of tenants (`SchedulerConfig`).

    See `emberkv.config.ServeConfig` for the rest.
    """

    cache_bytes: int
    block_size: int
    prefill_chunk: int
    max_step_tokens: int = 256
    max_running: int = 64
    eviction: str = "lru"
    exact: bool = False
    prefix_cache: bool = True
    tiers: TierConfig = field(default_factory=TierConfig)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AssembledEngine:
    """root: of the model's block hashes. namespace: under which its blocks outlive the process (`Namespace.digest`).

    public: the prefixes that all tenants share. tiers: below the pool, and link: what connects them to it; None where
    there are none, or no prefix cache.
    """

    loop: EngineLoop
    executor: TorchEngine
    scheduler: Scheduler
    root: BlockHash
    namespace: bytes
    public: PublicPrefixes
    tiers: TierManager | None = None
    link: TierLink | None = None

    @property
    def block_size(self) -> int:
        """Tokens."""
        return self.scheduler.cache.pool.block_size

    @property
    def hit_unit(self) -> int:
        """Hits are rounded down to a multiple of this many tokens."""
        return self.scheduler.cache.hit_unit

    def close(self, timeout: float = 10.0) -> None:
        """Stop the loop, and store what waits to be stored for ``timeout`` seconds at most."""
        self.loop.stop()
        if self.tiers is not None:
            self.tiers.close(timeout)


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
    """An engine whose thread is not started yet. on_crash: see `EngineLoop`; on_evicted: see `EvictionHook`.

    kernels, sampler, progress: see `TorchEngine`. public_prefixes: token sequences that all tenants share.

    Raises ConfigError when a setting cannot work, UnsupportedModelError when the paged attention does not reproduce the
    model's own, CacheFolderError when the disk tier's folder can be neither made nor read.
    """
    block_cost = recompute_cost(loaded, config.block_size)  # before packing takes weights out of the parameters
    executor = _checked_executor(loaded, config, kernels, sampler, progress)
    unit = executor.alignment
    if config.prefix_cache and unit >= min(loaded.context_length, executor.pool.num_blocks * config.block_size):
        _log.warning(
            "nothing will be reused: hits are whole runs of %d tokens here, and no prompt is longer; use a "
            "smaller --prefill-chunk",
            unit,
        )
    root = root_hash(loaded.fingerprint, config.block_size)
    namespace = namespace_of(executor, root).digest()
    with ExitStack() as on_failure:
        tiers = None
        if config.prefix_cache:
            tiers = open_tiers(
                config.tiers,
                config.eviction,
                namespace,
                block_bytes=executor.pool.block_bytes,
                on_evicted=on_evicted,
            )
        if tiers is not None:
            on_failure.callback(tiers.close, 0.0)
        scheduler, link = _scheduler(executor, config, block_cost, tiers)
        on_failure.pop_all()
    limits = ModelLimits(loaded.context_length, loaded.geometry.vocab_size, loaded.eos_token_ids)
    public = PublicPrefixes(public_prefixes, config.block_size)
    control = CacheControl(
        scheduler,
        lower=link.peeking if link is not None else None,
        manager=tiers,
        transfer=BlockTransfer(scheduler.cache, executor.pool, namespace),
    )
    loop = EngineLoop(
        executor,
        scheduler,
        limits,
        root=root,
        tiers=link,
        control=control,
        public=public,
        on_crash=on_crash,
    )
    return AssembledEngine(loop, executor, scheduler, root, namespace, public, tiers, link)


def _checked_executor(
    loaded: LoadedModel,
    config: EngineConfig,
    kernels: Kernels | None,
    sampler: Sampler | None,
    progress: Callable[[str], None],
) -> TorchEngine:
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


def _scheduler(
    executor: TorchEngine, config: EngineConfig, block_cost: BlockCost, tiers: TierManager | None
) -> tuple[Scheduler, TierLink | None]:
    policy = config.tiers.pool_policy(config.eviction, executor.pool.num_bytes)
    pool = BlockPool(
        executor.pool.num_blocks, config.block_size, policy=policy, block_cost=block_cost, journal=tiers is not None
    )
    cache = PrefixCache(
        pool,
        alignment=executor.alignment,
        batch_invariant=executor.batch_invariant,
        exact=config.exact,
        enabled=config.prefix_cache,
    )
    step_tokens = max(1, config.max_step_tokens // config.prefill_chunk) * config.prefill_chunk
    link = TierLink(tiers, executor.pool, step_tokens=step_tokens, exact=config.exact) if tiers is not None else None
    limits = SchedulerConfig(config.prefill_chunk, config.max_step_tokens, config.max_running, config.weights)
    return Scheduler(cache, limits, link), link


def recompute_cost(loaded: LoadedModel, block_size: int) -> BlockCost:
    """What a block costs to compute again, in floating-point operations, against its bytes.

    Two operations per weight and token, and four per query channel and key seen: later blocks cost more.
    """
    geometry = loaded.geometry
    linear = 2.0 * sum(parameter.numel() for parameter in loaded.model.parameters()) * block_size
    per_key = 4.0 * geometry.num_layers * geometry.num_heads * geometry.head_dim * block_size
    size = float(geometry.bytes_per_token(loaded.dtypes.kv) * block_size)
    return lambda position: EntryCost(size, linear + per_key * position * block_size)
