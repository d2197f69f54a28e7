"""The summary of a simulation, computed from the same numbers that its CSV has.

Percentiles are nearest ranks, so that each is a value of the CSV. Rates of tokens and hits are over completed requests.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emberkv.sim.config import Targets
from emberkv.sim.latencies import Attainment, Pace, ratio
from emberkv.sim.outcome import CacheEvent, Status
from emberkv.sim.rows import Row, Rows
from emberkv.sim.series import Series
from emberkv.sim.timing import NANOSECONDS

POINTS = 64
"""Most samples of memory over time in a summary."""


def summarize(
    rows: Rows, *, slo: Targets | None = None, series: Series | None = None, blocks_of: int | None = None
) -> dict[str, Any]:
    """As JSON takes it. Times are in seconds or, where the name says so, milliseconds; tokens unless said.

    blocks_of: tokens of a block, to count hits in blocks too. One pass over the rows.
    """
    statuses, ends = Counter[Status](), Counter[str]()
    caching, pace, blocks, attained = Caching(), Pace(), Blocks(blocks_of or 1), Attainment(slo or Targets())
    tiers = Counter[str]()
    replicas: dict[int, Caching] = {}
    for row in rows:
        statuses[row.status] += 1
        ends.update(preemptions=row.preemptions, retries=row.retries)
        if row.status is not Status.COMPLETED:
            continue
        for part in (caching, pace, blocks, attained):
            part.add(row)
        tiers.update(dict(zip(rows.tiers, row.tier_tokens, strict=True)))
        if row.replica is not None:
            replicas.setdefault(row.replica, Caching()).add(row)
    summary = {
        "requests": {"total": len(rows), **{status.value: statuses[status] for status in Status}},
        **pace.found(),
        "success_rate": ratio(statuses[Status.COMPLETED], len(rows)),
        "slo": attained.found(len(rows) - statuses[Status.REJECTED]),
        "prefix_caching": caching.found(),
        "tiers": caching.by_tier({name: tiers[name] for name in rows.tiers}),
        "replicas": [{"replica": index, **part.totals()} for index, part in sorted(replicas.items())],
        "preemptions": ends["preemptions"],
        "retries": ends["retries"],
    }
    if blocks_of is not None:
        summary["blocks"] = blocks.found()
    if series is not None:
        summary["memory_over_time"] = memory_over_time(series)
    return summary


def prefix_caching(rows: Iterable[Row]) -> dict[str, Any]:
    """What the cache did for these requests; see `Caching.found`."""
    caching = Caching()
    for row in rows:
        caching.add(row)
    return caching.found()


@dataclass(slots=True)
class Caching:
    """Sums over requests of what was cached and what was computed. later: those that are not a session's first."""

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

    def found(self) -> dict[str, Any]:
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
    """Hits in blocks; a prompt's partial last block counts as one, as in `emberkv.sim.cache_only`."""

    size: int
    references: int = 0
    hits: int = 0

    def add(self, row: Row) -> None:
        self.references += -(-row.prompt_tokens // self.size)
        self.hits += -(-row.cached_tokens // self.size)

    def found(self) -> dict[str, Any]:
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
