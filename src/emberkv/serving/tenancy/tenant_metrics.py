"""Who uses how much: each tenant's requests, tokens and bytes. For the operator only."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from emberkv.core.explaining.explanation import POOL
from emberkv.engine.request import CacheUsage, EngineStats
from emberkv.serving.metric_families import EngineStatsCollector


class TenantMetrics:
    """In a registry of its own. read_engine: None before there is an engine."""

    def __init__(self, read_engine: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_BytesCollector(read_engine))
        self._requests = self._counter("requests", "Requests that were answered, or broken off.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of their prompts.")
        self._hit_tokens = self._counter("hit_tokens", "Of these, tokens reused from the cache.")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"emberkv_tenant_{name}", text, labelnames=("tenant",), registry=self._registry)

    def count(self, tenant: str, usages: Sequence[CacheUsage]) -> None:
        """One more request and its prompts."""
        self._requests.labels(tenant).inc()
        self._prompt_tokens.labels(tenant).inc(sum(usage.prompt_tokens for usage in usages))
        self._hit_tokens.labels(tenant).inc(sum(usage.cached_tokens for usage in usages))

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class _BytesCollector(EngineStatsCollector):
    def families(self, stats: EngineStats) -> Iterator[Metric]:
        held = GaugeMetricFamily(
            "emberkv_tenant_bytes", "Bytes cached for a tenant, or for all in public blocks.", labels=["tier", "tenant"]
        )
        places: dict[str, Mapping[str, int]] = {POOL: stats.pool_bytes_by_owner}
        places.update((name, tier.bytes_by_owner) for name, tier in stats.tiers.items())
        for place, owners in places.items():
            for owner, size in sorted(owners.items()):
                held.add_metric([place, owner], size)
        yield held
