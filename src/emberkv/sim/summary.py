"""The summary room: what a simulation comes to, computed from the same numbers that its CSV has.

Percentiles are nearest ranks, so that each is a value of the CSV. Rates of tokens and hits are over completed requests.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, fsum
from typing import Any

from emberkv.sim.config import Targets
from emberkv.sim.outcome import CacheEvent, Status
from emberkv.sim.rows import Row, Rows
from emberkv.sim.series import Series
from emberkv.sim.timing import NANOSECONDS

PERCENTILES = (50, 90, 95, 99)
POINTS = 64
"""Most samples of memory over time in a summary."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the sorted, non-empty values do not exceed."""
    return ordered[max(0, ceil(percent * len(ordered) / 100) - 1)]


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and extremes of those that are there; None without any."""
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


def summarize(
    rows: Rows, *, slo: Targets | None = None, series: Series | None = None, blocks_of: int | None = None
) -> dict[str, Any]:
    """As JSON takes it. Times are in seconds or, where the name says so, milliseconds; tokens unless said.

    blocks_of: tokens of a block, to count hits in blocks too.
    """
    statuses: Counter[Status] = Counter()
    completed: list[Row] = []
    for row in rows:
        statuses[row.status] += 1
        if row.status is Status.COMPLETED:
            completed.append(row)
    summary = {
        "requests": {"total": len(rows), **{status.value: statuses[status] for status in Status}},
        **_pace(completed),
        "ttft_ms": spread([row.ttft_ms for row in completed]),
        "tpot_ms": spread([row.tpot_ms for row in completed]),
        "e2e_latency_ms": spread([row.e2e_ms for row in completed]),
        "slo": _attainment(completed, slo or Targets(), len(rows) - statuses[Status.REJECTED]),
        "prefix_caching": prefix_caching(completed),
        "tiers": _tiers(completed, rows.tiers),
        "replicas": _replicas(completed),
        "preemptions": sum(row.preemptions for row in rows),
        "retries": sum(row.retries for row in rows),
    }
    if blocks_of is not None:
        summary["blocks"] = _blocks(completed, blocks_of)
    if series is not None:
        summary["memory_over_time"] = memory_over_time(series)
    return summary


def prefix_caching(completed: Sequence[Row]) -> dict[str, Any]:
    """Hit rates are shares of prompt tokens; request_hit_rate of requests that hit anything."""
    prompts = sum(row.prompt_tokens for row in completed)
    cached = sum(row.cached_tokens for row in completed)
    prefilled = sum(row.prefilled_tokens for row in completed)
    later = [row for row in completed if row.conversational]
    events = Counter(row.event for row in completed)
    return {
        "overall_hit_rate": ratio(cached, prompts),
        "conversational_hit_rate": ratio(
            sum(row.cached_tokens for row in later), sum(row.prompt_tokens for row in later)
        ),
        "conversational_requests": len(later),
        "request_hit_rate": ratio(sum(row.cached_tokens > 0 for row in completed), len(completed)),
        "event_counts": {event.value: events[event] for event in CacheEvent},
        "average_cached_prefix_length": ratio(cached, len(completed)),
        "average_tokens_prefilled": ratio(prefilled, len(completed)),
        "prefill_reduction_ratio": 1 - ratio(prefilled, prompts) if prompts else 0.0,
        "total_tokens_saved": cached,
    }


def _blocks(completed: Sequence[Row], size: int) -> dict[str, Any]:
    """A prompt's partial last block counts as one, as in `emberkv.sim.cache_only`."""
    references = sum(-(-row.prompt_tokens // size) for row in completed)
    hits = sum(-(-row.cached_tokens // size) for row in completed)
    return {"references": references, "hits": hits, "hit_rate": ratio(hits, references)}


def _pace(completed: Sequence[Row]) -> dict[str, Any]:
    """duration: from the first arrival to the last completion."""
    ends = [row.completion / NANOSECONDS for row in completed if row.completion is not None]
    duration = max(ends) - min(row.arrival for row in completed) / NANOSECONDS if ends else 0.0
    return {
        "duration": duration,
        "throughput": {
            "requests_per_second": ratio(len(completed), duration),
            "prompt_tokens_per_second": ratio(sum(row.prompt_tokens for row in completed), duration),
            "output_tokens_per_second": ratio(sum(row.output_tokens for row in completed), duration),
        },
    }


def _attainment(completed: Sequence[Row], slo: Targets, wanted: int) -> dict[str, Any] | None:
    """Shares of all requests that could be served; who did not complete attained nothing. None without targets."""
    targets: dict[str, tuple[float | None, Callable[[Row], float | None]]] = {
        "ttft_ms": (slo.ttft_ms, lambda row: row.ttft_ms),
        "tpot_ms": (slo.tpot_ms, lambda row: row.tpot_ms),
        "e2e_ms": (slo.e2e_ms, lambda row: row.e2e_ms),
    }
    kept = [True] * len(completed)
    found: dict[str, Any] = {}
    for name, (target, value_of) in targets.items():
        if target is None:
            continue
        values = [value_of(row) for row in completed]
        attained = [value is None or value <= target for value in values]
        kept = [before and now for before, now in zip(kept, attained, strict=True)]
        found[name] = {"target": target, "attained": ratio(sum(attained), wanted)}
    return {**found, "all": ratio(sum(kept), wanted)} if found else None


def _tiers(completed: Sequence[Row], tiers: Sequence[str]) -> dict[str, Any]:
    """Where cached tokens came from; what no lower tier brought was in the pool."""
    prompts = sum(row.prompt_tokens for row in completed)
    by_tier = {name: sum(row.tier_tokens[at] for row in completed) for at, name in enumerate(tiers)}
    found = {"pool": sum(row.cached_tokens for row in completed) - sum(by_tier.values()), **by_tier}
    return {name: {"tokens": tokens, "hit_rate": ratio(tokens, prompts)} for name, tokens in found.items()}


def _replicas(completed: Sequence[Row]) -> list[dict[str, Any]]:
    """By number, those that completed anything."""
    totals: dict[int, Counter[str]] = {}
    for row in completed:
        if row.replica is not None:
            totals.setdefault(row.replica, Counter()).update(
                requests=1,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                cached_tokens=row.cached_tokens,
                prefilled_tokens=row.prefilled_tokens,
            )
    return [
        {"replica": index, **found, "hit_rate": ratio(found["cached_tokens"], found["prompt_tokens"])}
        for index, found in sorted(totals.items())
    ]


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
