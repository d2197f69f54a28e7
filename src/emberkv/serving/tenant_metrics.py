"""Metrics by tenant, in a registry of their own: ``/metrics/tenants``, for the operator."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from emberkv.core.events import POOL
from emberkv.engine.request import CacheUsage, EngineStats
from emberkv.serving.metrics import EngineStatsCollector


class TenantBytesCollector(EngineStatsCollector):
    def families(self, stats: EngineStats) -> Iterator[Metric]:
        held = GaugeMetricFamily(
            "emberkv_tenant_bytes", "Bytes cached for a tenant, or for all in public blocks.", labels=["tier", "tenant"]
        )
        by_tier: dict[str, Mapping[str, int]] = {POOL: stats.pool_bytes_by_owner}
        by_tier.update((name, tier.bytes_by_owner) for name, tier in stats.tiers.items())
        for tier_name, owners in by_tier.items():
            for owner, size in sorted(owners.items()):
                held.add_metric([tier_name, owner], size)
        yield held


class TenantMetrics:
    """In a registry of its own. read_engine: None before there is an engine."""

    def __init__(self, read_engine: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(TenantBytesCollector(read_engine))
        self._requests = self._counter("requests", "Requests that were answered, or broken off.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of their prompts.")
        self._hit_tokens = self._counter("hit_tokens", "Of these, tokens reused from the cache.")
        self._limited = self._counter("limited_requests", "Requests refused because a limit was reached.", "limit")

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(f"emberkv_tenant_{name}", text, labelnames=("tenant", *more), registry=self._registry)

    def limited(self, tenant: str, limit: str) -> None:
        """A request was refused. limit: "requests", "tokens" or "concurrency"."""
        self._limited.labels(tenant, limit).inc()

    def count(self, tenant: str, usages: Sequence[CacheUsage]) -> None:
        """One more request and its prompts."""
        self._requests.labels(tenant).inc()
        self._prompt_tokens.labels(tenant).inc(sum(usage.prompt_tokens for usage in usages))
        self._hit_tokens.labels(tenant).inc(sum(usage.cached_tokens for usage in usages))

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)
