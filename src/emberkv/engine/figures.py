"""The engine's figures at a moment, gathered on its own thread."""

from emberkv.core.scheduler import Scheduler
from emberkv.engine.request import EngineStats
from emberkv.engine.tier_link import TierLink


def figures(scheduler: Scheduler, tiers: TierLink | None, block_bytes: int) -> EngineStats:
    """All but what the tiers count themselves, which is theirs to tell from any thread."""
    pool, stats = scheduler.cache.pool, scheduler.stats
    return EngineStats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        block_size=pool.block_size,
        block_bytes=block_bytes,
        total_blocks=pool.num_blocks,
        free_blocks=pool.num_free,
        cached_blocks=pool.num_evictable,
        prefix_query_tokens=stats.query_tokens,
        prefix_bypass_tokens=stats.bypass_tokens,
        prefix_hit_tokens=stats.hit_tokens,
        evictions=stats.evicted_blocks,
        preemptions=stats.preemptions,
        prefill_tokens=stats.prefill_tokens,
        decode_tokens=stats.decode_tokens,
        loads=len(scheduler.loads),
        tier_hit_tokens=dict(stats.tier_hit_tokens),
        load_choices={choice.value: count for choice, count in stats.load_choices.items()},
        loaded_blocks=stats.loaded_blocks,
        unloaded_blocks=stats.unloaded_blocks,
        tier_trouble=dict(tiers.trouble) if tiers is not None else {},
        pool_bytes_by_owner={owner: int(size) for owner, size in pool.policy.bytes_by_owner().items()},
    )
