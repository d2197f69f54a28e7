"""What the stack measures of one tier: its traffic, what it refused, and how fast it is."""

import threading
from collections import Counter
from dataclasses import replace

from emberkv.core.analytics.latency_model import LatencyModel
from emberkv.tiers.stats import LatencyHistogram, TierStats


class TierMeter:
    """Counters of one tier, for any number of threads. Times are in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = self._misses = self._loads = self._stores = self._stalls = 0
        self._corrupt: Counter[str] = Counter()
        self._load_latency = LatencyHistogram()
        self._store_latency = LatencyHistogram()
        self._rate = LatencyModel()
        self._block_bytes = 0

    def looked_up(self, hits: int, misses: int) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses

    def loaded(self, blocks: int, seconds: float) -> None:
        """One batch was read, and ``blocks`` of it were sound."""
        with self._lock:
            self._loads += blocks
            self._load_latency.observe(seconds)

    def fetched(self, blocks: int, size: int, seconds: float) -> None:
        """A whole fetch brought so many blocks, of ``size`` bytes together, from its first read to its last."""
        with self._lock:
            self._rate.observe(size, seconds)
            self._block_bytes = size // blocks

    def stored(self, blocks: int, seconds: float) -> None:
        with self._lock:
            self._stores += blocks
            self._store_latency.observe(seconds)

    def refused(self, fault: str) -> None:
        with self._lock:
            self._corrupt[fault] += 1

    def stalled(self) -> None:
        """A read has taken longer than the request for its blocks waits."""
        with self._lock:
            self._stalls += 1

    def seconds_for(self, blocks: int) -> float | None:
        """Expected time to fetch so many; None before the first fetch."""
        with self._lock:
            return self._rate.seconds_for(blocks * self._block_bytes) if self._block_bytes else None

    def complete(self, stats: TierStats) -> TierStats:
        """What the tier says of itself, with the traffic."""
        with self._lock:
            return replace(
                stats,
                hits=self._hits,
                misses=self._misses,
                loads=self._loads,
                stores=self._stores,
                corrupt=dict(self._corrupt),
                troubles={**stats.troubles, **({"stalled": self._stalls} if self._stalls else {})},
                load_latency=self._load_latency.snapshot(),
                store_latency=self._store_latency.snapshot(),
            )
