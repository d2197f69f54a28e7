"""What Prometheus sees of the places that keep blocks: the pool, and each tier below it."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from emberkv.core.explaining.explanation import POOL
from emberkv.core.promotion import LoadChoice
from emberkv.engine.request import EngineStats
from emberkv.serving.metric_families import EngineStatsCollector, label_value, labelled_counter, labelled_gauge
from emberkv.tiers.stats import BOUNDS, Latencies, StackStats, TierStats

_LE = (*map(str, BOUNDS), "+Inf")


class TierCollector(EngineStatsCollector):
    """Lookups, loads and stores by tier, and what went wrong with them."""

    def families(self, stats: EngineStats) -> Iterator[Metric]:
        yield from _tokens(stats)
        yield from _loads(stats)
        yield from _blocks(stats.tiers)
        yield from _faults(stats.tiers)
        yield from _latencies(stats.tiers)
        if stats.stack is not None:
            yield from _writing(stats.stack)


def _tokens(stats: EngineStats) -> Iterator[Metric]:
    """The pool is the first tier; each is looked into for what no faster one has, and those below in full blocks."""
    pool = stats.prefix_hit_tokens - sum(stats.tier_hit_tokens.values())
    size, tiers = stats.block_size, stats.tiers.items()
    hits = {POOL: pool, **{name: tier.hits * size for name, tier in tiers}}
    misses = {POOL: stats.prefix_query_tokens - pool, **{name: tier.misses * size for name, tier in tiers}}
    reused = {POOL: pool, **{name: stats.tier_hit_tokens.get(name, 0) for name in stats.tiers}}
    yield _counter("hit_tokens", "Prompt tokens looked up and found.", hits)
    yield _counter("miss_tokens", "Prompt tokens looked up and not found.", misses)
    yield _counter("reused_tokens", "Prompt tokens not computed, by where they came from.", reused)


def _loads(stats: EngineStats) -> Iterator[Metric]:
    choices = {choice.value: stats.load_choices.get(choice.value, 0) for choice in LoadChoice}
    text = "Prompts whose missing blocks were looked for below the pool."
    yield labelled_counter("emberkv_load_choices", text, "choice", choices)
    shared = choices[LoadChoice.SHARED.value]
    yield CounterMetricFamily("emberkv_loads_avoided", "Loads avoided by sharing one in flight.", value=shared)
    yield GaugeMetricFamily("emberkv_loads_running", "Loads from lower tiers in flight.", value=stats.loads)
    blocks = {"arrived": stats.loaded_blocks, "lost": stats.unloaded_blocks}
    yield labelled_counter("emberkv_load_blocks", "Blocks that loads were to bring.", "outcome", blocks)
    lost = dict(sorted(stats.tier_trouble.items()))
    yield labelled_counter("emberkv_transfer_troubles", "Blocks lost on their way.", "kind", lost)


def _blocks(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    yield _gauge("blocks", "Blocks held.", {name: tier.entries for name, tier in tiers.items()})
    yield _gauge("bytes", "Bytes held.", {name: tier.bytes for name, tier in tiers.items()})
    yield _gauge("max_bytes", "Bytes that may be held.", {name: tier.max_bytes for name, tier in tiers.items()})
    yield _counter("loads", "Blocks read and verified.", {name: tier.loads for name, tier in tiers.items()})
    yield _counter("stores", "Blocks written.", {name: tier.stores for name, tier in tiers.items()})
    yield _counter("evictions", "Blocks given up.", {name: tier.evictions for name, tier in tiers.items()})


def _faults(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    kinds: tuple[tuple[str, str, str, Callable[[TierStats], Mapping[str, int]]], ...] = (
        ("skipped", "Blocks not stored.", "reason", lambda tier: tier.skipped),
        ("corrupt", "Blocks refused and removed.", "fault", lambda tier: tier.corrupt),
        ("troubles", "Failures of the place itself.", "kind", lambda tier: tier.troubles),
    )
    for name, text, label, counts in kinds:
        family = CounterMetricFamily(f"emberkv_tier_{name}", text, labels=["tier", label])
        for tier, stats in tiers.items():
            for kind, count in sorted(counts(stats).items()):
                family.add_metric([tier, label_value(kind)], count)
        yield family


def _latencies(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    loads = HistogramMetricFamily("emberkv_tier_load_seconds", "Time to read a batch of blocks.", labels=["tier"])
    stores = HistogramMetricFamily("emberkv_tier_store_seconds", "Time to store a batch of blocks.", labels=["tier"])
    for name, tier in tiers.items():
        loads.add_metric([name], _buckets(tier.load_latency), tier.load_latency.seconds)
        stores.add_metric([name], _buckets(tier.store_latency), tier.store_latency.seconds)
    yield loads
    yield stores


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    return list(zip(_LE, map(float, accumulate(latencies.counts)), strict=True))


def _writing(stack: StackStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("emberkv_tier_queue_bytes", "Bytes that wait to be stored.", value=stack.queue_bytes)
    offers = {
        "stored already": stack.already_stored,
        "queue full": stack.queue_full,
        "queued": stack.offered - stack.already_stored - stack.queue_full,
    }
    yield labelled_counter("emberkv_tier_offers", "Blocks offered to the tiers, by outcome.", "outcome", offers)
    failures = dict(sorted(stack.failures.items()))
    yield labelled_counter("emberkv_tier_failures", "Work on tiers that failed unforeseen.", "error", failures)


def _counter(name: str, text: str, values: Mapping[str, int]) -> Metric:
    return labelled_counter(f"emberkv_tier_{name}", text, "tier", values)


def _gauge(name: str, text: str, values: Mapping[str, int]) -> Metric:
    return labelled_gauge(f"emberkv_tier_{name}", text, "tier", values)
