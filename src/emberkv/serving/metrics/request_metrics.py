"""Metrics that are counted as requests are served, and the registry that holds all metrics."""

from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import Collector

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, EngineStats, TokenOutput
from emberkv.serving.metrics.collectors import EngineCollector, TenantBytesCollector

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PROMPT_BUCKETS = tuple(2**power for power in range(4, 18))  # 16 to 131,072 tokens
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

Clock = Callable[[], float]
"""Seconds, monotonic."""


class ServingMetrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, read_engine: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(read_engine))
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=self._registry)
        self.http = HttpMetrics(self._registry)
        self.prompt_tokens = Histogram(
            "emberkv_prompt_tokens",
            "Tokens of a prompt, cached ones included.",
            labelnames=("api",),
            buckets=_PROMPT_BUCKETS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "emberkv_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "emberkv_inter_token_seconds",
            "Between one token of an answer and the next.",
            buckets=_INTER_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.queue = Histogram(
            "emberkv_queue_seconds",
            "From the engine's receipt of a request to the first step that worked on it.",
            buckets=_QUEUE_BUCKETS,
            registry=self._registry,
        )
        self.finished = Counter(
            "emberkv_requests_finished",
            "Answers ended, by how.",
            labelnames=("api", "reason"),
            registry=self._registry,
        )

    def register(self, collector: Collector) -> None:
        """Have another collector's metrics read with these."""
        self._registry.register(collector)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class HttpMetrics:
    """HTTP requests by route, method and status, and how long they took, from arrival to the response's last byte."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "emberkv_http_requests",
            "HTTP requests answered. Status 499: the client left first.",
            labelnames=("route", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "emberkv_http_request_seconds",
            "From an HTTP request's arrival to the end of its response.",
            labelnames=("route", "method"),
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """route: its template, not the path, so that there are few."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)


class AnswerTimer:
    """Times one answer, from the HTTP request's arrival on.

    first_token_seconds: until its first token; None before there is one. total_seconds: until it ended.
    """

    def __init__(self, metrics: ServingMetrics, clock: Clock, *, api: str, arrived: float) -> None:
        self._metrics = metrics
        self._clock = clock
        self._api = api
        self._arrived = arrived
        self._last_token: float | None = None
        self.first_token_seconds: float | None = None
        self.total_seconds = 0.0

    def record(self, output: TokenOutput) -> None:
        """An output has reached the event loop. Tokens that come together share their gap."""
        if output.queue_seconds is not None:
            self._metrics.queue.observe(output.queue_seconds)
        if not output.token_ids:
            return
        now = self._clock()
        if self._last_token is None:
            self.first_token_seconds = now - self._arrived
            self._metrics.first_token.observe(self.first_token_seconds)
        else:
            gap = (now - self._last_token) / len(output.token_ids)
            for _ in output.token_ids:
                self._metrics.inter_token.observe(gap)
        self._last_token = now

    def finished(self, reason: FinishReason) -> None:
        self.total_seconds = self._clock() - self._arrived
        self._metrics.finished.labels(self._api, reason.value).inc()


class TenantMetrics:
    """In a registry of its own. read_engine: None before there is an engine."""

    def __init__(self, read_engine: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(TenantBytesCollector(read_engine))
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
