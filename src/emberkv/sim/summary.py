"""The summary of a simulation, computed from the same numbers that its CSV has: latencies, hit rates and load.

Percentiles are nearest ranks, so that each is a value of the CSV. Rates of tokens and hits are over completed requests.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, fsum, inf
from typing import Any

from emberkv.sim.config import Targets
from emberkv.sim.formatting import format_count, format_rate, format_share
from emberkv.sim.outcome import CacheEvent, Row, Rows, Status
from emberkv.sim.replica import Series
from emberkv.sim.timing import NANOSECONDS

PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the sorted, non-empty values do not exceed."""
    return ordered[max(0, ceil(percent * len(ordered) / 100) - 1)]


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and extremes of the values that are not None; None without any."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    return {
        "mean": fsum(found) / len(found),
        **{f"p{percent}": percentile(found, percent) for percent in PERCENTILES},
        "min": found[0],
        "max": found[-1],
    }


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _doubles() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class PerformanceStats:
    """Latencies of each request in milliseconds, and throughput from the first arrival to the last completion.

    >>> stats = PerformanceStats()
    >>> done = (Status.COMPLETED, False, None)
    >>> stats.add(Row(0, 2_000_000, 500_000_000, 40, 4, *done, 0, 40, 0, 0, 0, ()))
    >>> stats.as_dict()["throughput"]["output_tokens_per_second"], stats.as_dict()["ttft_ms"]["p99"]
    (8.0, 2.0)
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_arrival: float = inf
    last_completion: float = -inf
    ttft: "array[float]" = field(default_factory=_doubles)
    tpot: "array[float]" = field(default_factory=_doubles)
    e2e: "array[float]" = field(default_factory=_doubles)

    def add(self, row: Row) -> None:
        self.requests += 1
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens
        self.first_arrival = min(self.first_arrival, row.arrival / NANOSECONDS)
        if row.completion is not None:
            self.last_completion = max(self.last_completion, row.completion / NANOSECONDS)
        for values, value in ((self.ttft, row.ttft_ms), (self.tpot, row.tpot_ms), (self.e2e, row.e2e_ms)):
            if value is not None:
                values.append(value)

    def as_dict(self) -> dict[str, Any]:
        duration = self.last_completion - self.first_arrival if self.e2e else 0.0
        return {
            "duration": duration,
            "throughput": {
                "requests_per_second": ratio(self.requests, duration),
                "prompt_tokens_per_second": ratio(self.prompt_tokens, duration),
                "output_tokens_per_second": ratio(self.output_tokens, duration),
            },
            "ttft_ms": percentiles(self.ttft),
            "tpot_ms": percentiles(self.tpot),
            "e2e_latency_ms": percentiles(self.e2e),
        }


class TargetAttainment:
    """How many requests kept each target, and all that were given. A latency that a request does not have is kept.

    >>> attained = TargetAttainment(Targets(ttft_ms=1.5))
    >>> done = (Status.COMPLETED, False, None)
    >>> attained.add(Row(0, 2_000_000, 500_000_000, 40, 4, *done, 0, 40, 0, 0, 0, ()))
    >>> attained.as_dict(wanted=1)["all"]
    0.0
    """

    __slots__ = ("_given", "_kept")

    def __init__(self, targets: Targets) -> None:
        self._given: dict[str, float] = {name: target for name, target in targets if target is not None}
        self._kept = Counter[str]()

    def add(self, row: Row) -> None:
        all_kept = True
        for name, target in self._given.items():
            value = getattr(row, name)
            attained = value is None or value <= target
            self._kept[name] += attained
            all_kept = all_kept and attained
        self._kept["all"] += all_kept

    def as_dict(self, wanted: int) -> dict[str, Any] | None:
        """Shares of ``wanted`` requests, those that could be served; None without targets."""
        given = self._given
        if not given:
            return None
        found = {
            name: {"target": target, "attained": ratio(self._kept[name], wanted)} for name, target in given.items()
        }
        return {**found, "all": ratio(self._kept["all"], wanted)}


FEWEST_WAITING = 10
WAITING_SHARE = 0.1
"""The queue grows if at least so many requests, and such a share of them, wait when the last conversation begins, and
half as many again as waited in the middle."""


@dataclass(frozen=True, slots=True)
class OfferedLoad:
    """Whether a set-up keeps up with the requests that arrive, judged by those that wait when arrivals end.

    asked_per_second, served_per_second: requests that arrived and that got their first token, from the first arrival to
    the beginning of the last conversation. waiting: requests without a first token at that time. grows: whether the
    queue grows without end; least_replicas: the fewest that could then serve what arrives, if each serves as many as
    here.

    >>> OfferedLoad(2.0, 2.0, waiting=0, grows=False, least_replicas=1).sentence
    'This set-up serves what arrives, 2 requests a second.'
    """

    asked_per_second: float
    served_per_second: float
    waiting: int
    grows: bool
    least_replicas: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sentence(self) -> str:
        """One sentence."""
        rates = f"{format_rate(self.served_per_second)} of {format_rate(self.asked_per_second)} requests a second"
        if not self.grows:
            return f"This set-up serves what arrives, {format_rate(self.asked_per_second)} requests a second."
        least = f"{format_count(self.least_replicas, 'replica is', 'replicas are')} the least"
        return f"This set-up serves {rates}: the queue grows without end; {least}."


def load_of(rows: Rows, replicas: int) -> OfferedLoad | None:
    """The load of a simulation's rows; None where all requests arrive at once, or none could be served.

    Follow-ups wait for answers, so the time that counts ends with the last request that begins a conversation.
    """
    begun = [arrival for arrival, _, conversational in rows.served() if not conversational]
    if not begun or max(begun) == min(begun):
        return None
    first, last = min(begun), max(begun)
    arrived = [(arrival, first_token) for arrival, first_token, _ in rows.served() if arrival <= last]
    waiting = [_waiting(arrived, at) for at in ((first + last) // 2, last)]
    seconds = (last - first) / NANOSECONDS
    started = len(arrived) - waiting[1]
    grows = waiting[1] >= max(FEWEST_WAITING, WAITING_SHARE * len(arrived), 1.5 * waiting[0])
    needed = ceil(replicas * len(arrived) / started) if started else 0
    least = max(needed, replicas + 1) if grows else replicas
    return OfferedLoad(len(arrived) / seconds, started / seconds, waiting[1], grows, least)


def _waiting(requests: Iterable[tuple[int, int | None]], at: int) -> int:
    """How many of them wait at a time; each is given by its arrival and its first token."""
    return sum(arrival <= at and (first is None or first > at) for arrival, first in requests)


def rejected_sentence(rejected: int, total: int) -> str:
    return (
        f"{format_count(rejected, 'request')} of {total:,} ({format_share(rejected / total)}) can never be served: "
        "their prompt and answer do not fit the KV memory of a replica."
    )


POINTS = 64
"""Most samples of memory over time in a summary."""


def summarize(
    rows: Rows, *, slo: Targets | None = None, series: Series | None = None, blocks_of: int | None = None
) -> dict[str, Any]:
    """All figures of a simulation, as JSON takes them. Times are in seconds or, where the name says so, milliseconds.

    blocks_of: tokens of a block, to count hits in blocks too. It takes one pass over the rows.
    """
    statuses, tiers = Counter[Status](), Counter[str]()
    preemptions = retries = 0
    caching, pace, blocks, attained = (
        CacheTotals(),
        PerformanceStats(),
        Blocks(blocks_of or 1),
        TargetAttainment(slo or Targets()),
    )
    replicas: dict[int, CacheTotals] = {}
    for row in rows:
        statuses[row.status] += 1
        preemptions += row.preemptions
        retries += row.retries
        if row.status is not Status.COMPLETED:
            continue
        caching.add(row)
        pace.add(row)
        blocks.add(row)
        attained.add(row)
        for name, tokens in zip(rows.tiers, row.tier_tokens, strict=True):
            tiers[name] += tokens
        if row.replica is not None:
            if row.replica not in replicas:
                replicas[row.replica] = CacheTotals()
            replicas[row.replica].add(row)
    summary = {
        "requests": {"total": len(rows), **{status.value: statuses[status] for status in Status}},
        **pace.as_dict(),
        "success_rate": ratio(statuses[Status.COMPLETED], len(rows)),
        "slo": attained.as_dict(len(rows) - statuses[Status.REJECTED]),
        "prefix_caching": caching.as_dict(),
        "tiers": caching.by_tier({name: tiers[name] for name in rows.tiers}),
        "replicas": [{"replica": index, **part.totals()} for index, part in sorted(replicas.items())],
        "preemptions": preemptions,
        "retries": retries,
    }
    if blocks_of is not None:
        summary["blocks"] = blocks.as_dict()
    if series is not None:
        summary["memory_over_time"] = memory_over_time(series)
    return summary


def prefix_caching(rows: Iterable[Row]) -> dict[str, Any]:
    """The cache's figures for these requests; see `CacheTotals.as_dict`."""
    caching = CacheTotals()
    for row in rows:
        caching.add(row)
    return caching.as_dict()


@dataclass(slots=True)
class CacheTotals:
    """Sums over requests of what was cached and what was computed. later: those that are not a session's first.

    >>> totals = CacheTotals()
    >>> totals.add(Row(0, 1, 2, 40, 4, Status.COMPLETED, False, None, 30, 10, 0, 0, 0, ()))
    >>> totals.as_dict()["token_hit_rate"], totals.by_tier({"ram": 10})["pool"]["tokens"]
    (0.75, 20)
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    hits: int = 0
    later: int = 0
    later_prompt_tokens: int = 0
    later_cached_tokens: int = 0
    later_hits: int = 0
    events: Counter[CacheEvent | None] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        self.requests += 1
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens
        self.cached_tokens += row.cached_tokens
        self.prefilled_tokens += row.prefilled_tokens
        self.hits += row.cached_tokens > 0
        self.events[row.event] += 1
        if row.conversational:
            self.later += 1
            self.later_prompt_tokens += row.prompt_tokens
            self.later_cached_tokens += row.cached_tokens
            self.later_hits += row.cached_tokens > 0

    def as_dict(self) -> dict[str, Any]:
        """token_hit_rate: share of prompt tokens found. request_hit_rate: share of requests that found any; other
        simulators call it overall_hit_rate, which is here too. conversational: of a session's later requests alone.
        prefill_reduction_ratio: 1 - tokens computed / prompt tokens; less than the token hit rate by what was computed
        again after preemptions and lost replicas (tokens_recomputed), and below 0 where that exceeds what was found.
        """
        return {
            "token_hit_rate": ratio(self.cached_tokens, self.prompt_tokens),
            "request_hit_rate": ratio(self.hits, self.requests),
            "overall_hit_rate": ratio(self.hits, self.requests),
            "conversational_token_hit_rate": ratio(self.later_cached_tokens, self.later_prompt_tokens),
            "conversational_hit_rate": ratio(self.later_hits, self.later),
            "conversational_requests": self.later,
            "event_counts": {event.value: self.events[event] for event in CacheEvent},
            "average_cached_prefix_length": ratio(self.cached_tokens, self.requests),
            "average_tokens_prefilled": ratio(self.prefilled_tokens, self.requests),
            "prefill_reduction_ratio": 1 - self.prefilled_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            "tokens_recomputed": max(0, self.cached_tokens + self.prefilled_tokens - self.prompt_tokens),
            "total_tokens_saved": self.cached_tokens,
        }

    def by_tier(self, brought: Mapping[str, int]) -> dict[str, Any]:
        """Where cached tokens came from; what no lower tier brought was in the pool."""
        found = {"pool": self.cached_tokens - sum(brought.values()), **brought}
        return {
            name: {"tokens": tokens, "hit_rate": ratio(tokens, self.prompt_tokens)} for name, tokens in found.items()
        }

    def totals(self) -> dict[str, Any]:
        """One replica's part."""
        names = ("requests", "prompt_tokens", "output_tokens", "cached_tokens", "prefilled_tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "hit_rate": ratio(self.cached_tokens, self.prompt_tokens),
        }


@dataclass(slots=True)
class Blocks:
    """Hits in blocks; a prompt's partial last block counts as one, as in `emberkv.sim.cache_only`.

    >>> blocks = Blocks(size=16)
    >>> blocks.add(Row(0, 1, 2, 40, 4, Status.COMPLETED, False, None, 32, 8, 0, 0, 0, ()))
    >>> blocks.as_dict()["hits"], blocks.as_dict()["references"]
    (2, 3)
    """

    size: int
    references: int = 0
    hits: int = 0

    def add(self, row: Row) -> None:
        self.references += -(-row.prompt_tokens // self.size)
        self.hits += -(-row.cached_tokens // self.size)

    def as_dict(self) -> dict[str, Any]:
        return {"references": self.references, "hits": self.hits, "hit_rate": ratio(self.hits, self.references)}


def memory_over_time(series: Series) -> dict[str, Any]:
    """Blocks held by requests and blocks cached (held or not), and bytes of each tier, over all replicas."""
    step = max(1, -(-len(series.times) // POINTS))
    tiers = sorted({name for each in series.replicas for name in each.tier_bytes})
    at = range(0, len(series.times), step)
    return {
        "seconds": [series.times[index] / NANOSECONDS for index in at],
        "used_blocks": [sum(each.used_blocks[index] for each in series.replicas) for index in at],
        "cached_blocks": [sum(each.cached_blocks[index] for each in series.replicas) for index in at],
        "tier_bytes": {
            name: [sum(each.tier_bytes[name][index] for each in series.replicas) for index in at] for name in tiers
        },
    }
