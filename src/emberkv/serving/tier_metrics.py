"""What Prometheus sees of the places that keep blocks: the pool, and each tier below it."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.core.explanation import POOL
from emberkv.core.promotion import LoadChoice
from emberkv.engine.request import EngineStats
from emberkv.tiers.stats import BOUNDS, Latencies, StackStats, TierStats

_BOUNDS = (*map(str, BOUNDS), "+Inf")


class TierCollector(Collector):
    """Reads the tiers' figures when they are asked for; before there is an engine, there are none."""

    def __init__(self, read: Callable[[], EngineStats | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        if stats is None:
            return
        yield from _tokens(stats)
        yield from _contents(stats.tiers)
        yield from _traffic(stats.tiers)
        yield from _losses(stats.tiers)
        yield from _loads(stats)
        if stats.stack is not None:
            yield from _writing(stats.stack)


def _tokens(stats: EngineStats) -> Iterator[Metric]:
    """By tier, in which the pool is the first. A tier is looked into for what no faster one has."""
    below = sum(stats.tier_hit_tokens.values())
    in_pool = stats.prefix_hit_tokens - below
    looked_up = {name: (tier.hits * stats.block_size, tier.misses * stats.block_size) for name, tier in stats.tiers.items()}
    found = {POOL: (in_pool, stats.prefix_query_tokens - in_pool), **looked_up}
    yield _counter("emberkv_tier_hit_tokens", "Prompt tokens looked up and found.", {at: hit for at, (hit, _) in found.items()})
    yield _counter("emberkv_tier_miss_tokens", "Prompt tokens looked up and not found.", {at: miss for at, (_, miss) in found.items()})
    reused = {POOL: in_pool, **{name: stats.tier_hit_tokens.get(name, 0) for name in stats.tiers}}
    yield _counter("emberkv_tier_reused_tokens", "Prompt tokens reused, by the tier that they came from.", reused)
