"""Puts an engine together around an executor: block pool, tiers, scheduler, thread."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from emberkv.core.block_pool import BlockCost, BlockPool, uniform_cost
from emberkv.core.events import EventLog
from emberkv.core.hashing import BlockHash, PublicPrefixes
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.engine.block_transfer import BlockTransfer
from emberkv.engine.commands import CacheControl
from emberkv.engine.constraints import ConstraintCompiler
from emberkv.engine.executor import Executor
from emberkv.engine.loop import EngineLoop
from emberkv.engine.request import ModelLimits
from emberkv.engine.tier_link import TierLink
from emberkv.tiers.kinds import TierConfig, open_tiers
from emberkv.tiers.manager import TierManager

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """cache_bytes: size of the KV pool. tiers: what lies below it. weights: of tenants (`SchedulerConfig`).

    block_size: tokens of a KV block. grow_blocks: a model with a large state of fixed size gets larger ones.
    prefill_chunk: tokens computed in a prefill pass, a multiple of block_size; of blocks that have grown, a part.
    max_step_tokens: token budget of a step that decodes and prefills. max_running: sequences at once. eviction: a name
    of `POLICY_NAMES`. exact: only KV state that is bit-equal to a cold prefill's is reused. prefix_cache: False
    computes every prompt anew. self_checks: a folder in which self-checks that were passed are remembered; None: each
    start makes one.
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
    self_checks: Path | None = None
    grow_blocks: bool = False


@dataclass(frozen=True, slots=True)
class AssembledEngine:
    """root: of the model's block hashes. namespace: under which its blocks outlive the process (`Namespace.digest`).

    public: the prefixes that all tenants share. tiers: below the pool, and link: what connects them to it; None where
    there are none, or no prefix cache.
    """

    loop: EngineLoop
    executor: Executor
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

    @property
    def kept_unit(self) -> int:
        """See `PrefixCache.kept_unit`."""
        return self.scheduler.cache.kept_unit

    def close(self, timeout: float = 10.0) -> None:
        """Stop the loop, and store what waits to be stored for ``timeout`` seconds at most."""
        self.loop.stop()
        if self.tiers is not None:
            self.tiers.close(timeout)


def assemble_around(
    executor: Executor,
    config: EngineConfig,
    *,
    limits: ModelLimits,
    root: BlockHash,
    namespace: bytes,
    block_cost: BlockCost = uniform_cost,
    public_prefixes: Iterable[Sequence[int]] = (),
    constraints: ConstraintCompiler | None = None,
    on_crash: Callable[[Exception], None] = lambda _: None,
) -> AssembledEngine:
    """An engine over ``executor`` whose thread is not started yet.

    root: of the model's block hashes. namespace: of the blocks that the executor computes, 32 bytes; it is checked
    whenever a stored block is read. block_cost: see `BlockPool`. public_prefixes: token sequences that all tenants
    share. constraints, on_crash: see `EngineLoop`.

    Raises ConfigError when a setting cannot work, CacheFolderError when the disk tier's folder can be neither made nor
    read.
    """
    with ExitStack() as on_failure:
        tiers = None
        if config.prefix_cache:
            tiers = open_tiers(config.tiers, config.eviction, namespace, block_bytes=executor.pool.block_bytes)
        if tiers is not None:
            on_failure.callback(tiers.close, 0.0)
        scheduler, link = _scheduler(executor, config, block_cost, tiers)
        on_failure.pop_all()
    if config.prefix_cache:
        _warn_of_long_units(scheduler.cache, limits.context_length)
    public = PublicPrefixes(public_prefixes, config.block_size)
    control = CacheControl(
        scheduler,
        lower=link.peeking if link is not None else None,
        manager=tiers,
        transfer=BlockTransfer(scheduler.cache, executor.pool, namespace, lower=link),
    )
    loop = EngineLoop(
        executor,
        scheduler,
        limits,
        root=root,
        tiers=link,
        control=control,
        public=public,
        constraints=constraints,
        on_crash=on_crash,
    )
    return AssembledEngine(loop, executor, scheduler, root, namespace, public, tiers, link)


def _warn_of_long_units(cache: PrefixCache, context_length: int) -> None:
    unit, block_size = cache.hit_unit, cache.pool.block_size
    if not cache.reuses_partial_blocks and unit >= min(context_length, cache.pool.num_blocks * block_size):
        _log.warning(
            "nothing will be reused: hits are whole runs of %d tokens here, and no prompt is longer; use a "
            "smaller %s%s",
            unit,
            "--block-size" if unit == block_size else "--prefill-chunk",
            " or a larger --cache-ram" if unit < context_length else "",
        )


def _scheduler(
    executor: Executor, config: EngineConfig, block_cost: BlockCost, tiers: TierManager | None
) -> tuple[Scheduler, TierLink | None]:
    policy = config.tiers.pool_policy(config.eviction, executor.pool.num_blocks * executor.pool.block_bytes)
    events = EventLog(epoch=os.urandom(16))
    if tiers is not None and any(tiers.contents().values()):
        events.require_snapshot()
    pool = BlockPool(
        executor.pool.num_blocks,
        config.block_size,
        policy=policy,
        block_cost=block_cost,
        events=events,
        journal=tiers is not None,
    )
    cache = PrefixCache(
        pool,
        alignment=executor.alignment,
        batch_invariant=executor.batch_invariant,
        within_blocks=executor.hits_within_blocks,
        exact=config.exact,
        enabled=config.prefix_cache,
    )
    step_tokens = max(1, config.max_step_tokens // config.prefill_chunk) * config.prefill_chunk
    link = TierLink(tiers, executor.pool, step_tokens=step_tokens, exact=config.exact) if tiers is not None else None
    limits = SchedulerConfig(config.prefill_chunk, config.max_step_tokens, config.max_running, config.weights)
    return Scheduler(cache, limits, link), link
