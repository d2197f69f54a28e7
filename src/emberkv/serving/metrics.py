"""Prometheus metrics: those counted as requests are served, and those read from the server's parts when asked for."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from emberkv import __version__
from emberkv.core.events import POOL
from emberkv.core.loading import LoadChoice
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import EngineStats, TokenOutput
from emberkv.serving.cache.ledger_store import ReuseWatch
from emberkv.serving.warmup.warmup import WarmupPhase, WarmupReport
from emberkv.tiers.breaker import Circuit
from emberkv.tiers.stats import BOUNDS, Latencies, StackStats, TierStats


class EngineStatsCollector(Collector):
    """Reads the engine's statistics at each collection; before there is an engine, there are none."""

    def __init__(self, read: Callable[[], EngineStats | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        if stats is not None:
            yield from self.families(stats)

    @abstractmethod
    def families(self, stats: EngineStats) -> Iterator[Metric]: ...


def labelled_counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """values: by the label's value."""
    return _filled(CounterMetricFamily(name, text, labels=[label]), values)


def labelled_gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """values: by the label's value."""
    return _filled(GaugeMetricFamily(name, text, labels=[label]), values)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label_value(label)], value)
    return family


def label_value(text: str) -> str:
    """A few words as a label's value, which has no spaces."""
    return text.replace(" ", "_")


class EngineCollector(EngineStatsCollector):
    """The pool, the requests and the tokens."""

    def families(self, stats: EngineStats) -> Iterator[Metric]:
        blocks = {
            "in_use": stats.total_blocks - stats.free_blocks,
            "cached": stats.cached_blocks,
            "empty": stats.free_blocks - stats.cached_blocks,
        }
        yield labelled_gauge("emberkv_pool_blocks", "Blocks of the pool.", "state", blocks)
        sizes = {state: count * stats.block_bytes for state, count in blocks.items()}
        yield labelled_gauge("emberkv_pool_bytes", "Bytes of the pool.", "state", sizes)
        gauges = (
            ("emberkv_requests_running", "Requests that hold blocks.", stats.running),
            ("emberkv_requests_waiting", "Requests that wait for blocks.", stats.waiting),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counters = (
            (
                "emberkv_prefix_cache_query_tokens",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            (
                "emberkv_prefix_cache_bypass_tokens",
                "Prompt tokens computed without a look into the prefix cache, for their log-probabilities.",
                stats.prefix_bypass_tokens,
            ),
            (
                "emberkv_prefix_cache_hit_tokens",
                "Prompt tokens reused from the prefix cache.",
                stats.prefix_hit_tokens,
            ),
            ("emberkv_evicted_blocks", "Cached blocks whose slot was taken.", stats.evictions),
            ("emberkv_preemptions", "Requests that lost their blocks to others.", stats.preemptions),
            ("emberkv_prefill_tokens", "Prompt tokens computed.", stats.prefill_tokens),
            ("emberkv_decode_tokens", "Answer tokens computed.", stats.decode_tokens),
            ("emberkv_compiled_constraints", "Schemas and grammars of answers compiled.", stats.compiled_constraints),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value=value)
        masks = {"ready": stats.masks_ready, "waited_for": stats.masks_waited}
        text = "Token masks of constrained answers, by whether they were there when the sampler asked."
        yield labelled_counter("emberkv_constraint_masks", text, "state", masks)
        if stats.checkpoints:
            text = "Checkpoints of a hybrid's state that were left in prompts, used, dropped, and loaded from tiers."
            yield labelled_counter("emberkv_checkpoints", text, "event", stats.checkpoints)


class AnswerMemoryCollector(Collector):
    """The size of the memory of answers. read: how many answers it has, and their bytes."""

    def __init__(self, read: Callable[[], tuple[int, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        answers, size = self._read()
        text = "Answers that are remembered as they were sampled."
        yield GaugeMetricFamily("emberkv_answer_memory_answers", text, value=answers)
        yield GaugeMetricFamily("emberkv_answer_memory_bytes", "Approximate bytes of these.", value=size)


class MemoryCollector(Collector):
    """Bytes of the model's weights, and of the tokenizer's cache, read at each collection."""

    def __init__(self, weights: Callable[[], int], tokenizer_cache: Callable[[], int]) -> None:
        self._weights, self._tokenizer_cache = weights, tokenizer_cache

    def collect(self) -> Iterator[Metric]:
        text = "Bytes of the weights as layers hold them: packed, quantised or plain; 0 while no model is loaded."
        yield GaugeMetricFamily("emberkv_weights_bytes", text, value=self._weights())
        text = "Bytes of remembered encodings of texts, of all tenants together."
        yield GaugeMetricFamily("emberkv_tokenizer_cache_bytes", text, value=self._tokenizer_cache())


class BuildCollector(Collector):
    """``emberkv_build_info``: the version, and the model once there is one.

    about: the model's name and how it is computed, by label.
    """

    def __init__(self, about: Callable[[], Mapping[str, str]]) -> None:
        self._about = about

    def collect(self) -> Iterator[Metric]:
        text = "What is served by what; always 1."
        yield InfoMetricFamily("emberkv_build", text, value={"version": __version__, **self._about()})


_LE = (*map(str, BOUNDS), "+Inf")


class TierCollector(EngineStatsCollector):
    """Lookups, loads and stores by tier, and what went wrong with them."""

    def families(self, stats: EngineStats) -> Iterator[Metric]:
        yield from _tokens(stats)
        yield from _loads(stats)
        yield from _transfers(stats)
        yield from _blocks(stats.tiers)
        yield from _circuits(stats.tiers)
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
    lost = dict(sorted(stats.transfer_errors.items()))
    yield labelled_counter("emberkv_transfer_errors", "Blocks lost on their way.", "kind", lost)


def _transfers(stats: EngineStats) -> Iterator[Metric]:
    blocks = {"exported": stats.exported_blocks, "imported": stats.imported_blocks}
    yield labelled_counter("emberkv_transferred_blocks", "Blocks moved between engines.", "direction", blocks)
    refused = dict(sorted(stats.refused_imports.items()))
    text = "Records that were not imported, by what was wrong with them."
    yield labelled_counter("emberkv_refused_imports", text, "fault", refused)


def _blocks(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    yield _gauge("blocks", "Blocks held.", {name: tier.entries for name, tier in tiers.items()})
    yield _gauge("bytes", "Bytes held.", {name: tier.bytes for name, tier in tiers.items()})
    yield _gauge("max_bytes", "Bytes that may be held.", {name: tier.max_bytes for name, tier in tiers.items()})
    yield _counter("loads", "Blocks read and verified.", {name: tier.loads for name, tier in tiers.items()})
    yield _counter("stores", "Blocks written.", {name: tier.stores for name, tier in tiers.items()})
    yield _counter("evictions", "Blocks given up.", {name: tier.evictions for name, tier in tiers.items()})


def _circuits(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    text = "1 for the state that the breaker of a tier's server is in, 0 for the others; closed: the server is used."
    family = GaugeMetricFamily("emberkv_tier_circuit", text, labels=["tier", "state"])
    for name, tier in tiers.items():
        for circuit in Circuit if tier.circuit is not None else ():
            family.add_metric([name, circuit.value], float(circuit is tier.circuit))
    yield family


def _faults(tiers: Mapping[str, TierStats]) -> Iterator[Metric]:
    kinds: tuple[tuple[str, str, str, Callable[[TierStats], Mapping[str, int]]], ...] = (
        ("skipped", "Blocks not stored.", "reason", lambda tier: tier.skipped),
        ("corrupt", "Blocks refused and removed.", "fault", lambda tier: tier.corrupt),
        ("errors", "Failures of the tier's storage.", "kind", lambda tier: tier.errors),
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
    lookups = HistogramMetricFamily("emberkv_tier_lookup_seconds", "Time of a look-up by I/O.", labels=["tier"])
    for name, tier in tiers.items():
        loads.add_metric([name], _buckets(tier.load_latency), tier.load_latency.seconds)
        stores.add_metric([name], _buckets(tier.store_latency), tier.store_latency.seconds)
        lookups.add_metric([name], _buckets(tier.lookup_latency), tier.lookup_latency.seconds)
    yield loads
    yield stores
    yield lookups


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


class ReuseCollector(Collector):
    """Reads the estimated curve at each collection; before there is traffic, there is none.

    read: the watch of the model that is served; None before it is loaded.
    """

    def __init__(self, read: Callable[[], ReuseWatch | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio",
            "Share of the prompt blocks of recent traffic that an LRU cache of this size would have had; a sample.",
            labels=["cache_bytes"],
        )
        error = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio_error", "One standard error of the estimate.", labels=["cache_bytes"]
        )
        watch = self._read()
        if watch is not None:
            for point in watch.curve():
                label = [str(point.capacity_blocks * watch.block_bytes)]
                rate.add_metric(label, point.hit_rate)
                error.add_metric(label, point.error)
        yield rate
        yield error


class WarmupCollector(Collector):
    """Reads the warmup's report at each collection."""

    def __init__(self, read: Callable[[], WarmupReport]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        report = self._read()
        prompts = {"warm": report.warm_prompts, "cold": report.prompts - report.warm_prompts}
        yield labelled_gauge("emberkv_warmup_prompts", "Prompts to be kept warm.", "state", prompts)
        phases = {each.value: float(each is report.phase) for each in WarmupPhase}
        yield labelled_gauge("emberkv_warmup_phase", "1 for how the warmup at the start stands.", "phase", phases)
        gauges = (
            ("emberkv_warmup_cached_tokens", "Tokens of these prompts that were cached when last seen.", report.tokens),
            ("emberkv_warmup_restored_prompts", "Learned prompts warmed at the start.", report.restored),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counters = (
            ("emberkv_warmup_seconds", "Time spent on warming.", report.seconds),
            ("emberkv_warmup_tokens", "Tokens computed to warm prompts.", report.computed_tokens),
            ("emberkv_warmup_timeouts", "Prompts whose warming ran out of time.", report.timeouts),
        )
        for name, text, total in counters:
            yield CounterMetricFamily(name, text, value=total)


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
        self.canonical_changes = Counter(
            "emberkv_canonical_changes",
            "Lines and tools of prompts that a canonical rule changed.",
            labelnames=("rule",),
            registry=self._registry,
        )
        self.history_answers = Counter(
            "emberkv_history_answers",
            "Answers in the histories of prompts, by whether the sampled tokens were put in, or why not.",
            labelnames=("outcome",),
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

    submitted_seconds: until it was submitted to the engine. first_token_seconds: until its first token; None before
    there is one. total_seconds: until it ended. For queue_seconds, load_seconds and route_seconds see `TokenOutput`.
    """

    def __init__(self, metrics: ServingMetrics, clock: Clock, *, api: str, arrived: float) -> None:
        self._metrics = metrics
        self._clock = clock
        self._api = api
        self._arrived = arrived
        self._last_token: float | None = None
        self.submitted_seconds = clock() - arrived
        self.queue_seconds: float | None = None
        self.load_seconds = 0.0
        self.route_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.total_seconds = 0.0

    def record(self, output: TokenOutput) -> None:
        """An output has reached the event loop. Tokens that come together share their gap."""
        if output.queue_seconds is not None:
            self._metrics.queue.observe(output.queue_seconds)
            self.queue_seconds, self.load_seconds = output.queue_seconds, output.load_seconds
            self.route_seconds = output.route_seconds
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
