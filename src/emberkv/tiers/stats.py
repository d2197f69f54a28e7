"""Statistics of tiers: contents, traffic, failures by kind, and how long loads and stores take."""

import logging
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from emberkv.core.loading import LatencyModel
from emberkv.tiers.breaker import Circuit

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds, in seconds, of a latency histogram's buckets; one more bucket has no bound."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """counts: by bucket of `BOUNDS`, each for itself, and last those above. seconds: their sum."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


class LatencyHistogram:
    """Counts durations. Not thread-safe."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def snapshot(self) -> Latencies:
        return Latencies(tuple(self._counts), self._seconds)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier at a moment. The tier itself fills the first part; the manager, which drives and verifies it, the second.

    entries, bytes: held now, on a disk those of other models included; bytes never exceed max_bytes. evictions: in
    blocks. skipped: stores left undone, by reason. errors: failures of the place, by kind. circuit: of a tier in the
    network, whether its server is used; None for the others.

    hits, misses: blocks looked up, counted where no faster tier has them. loads: blocks brought up and verified.
    stores: blocks that the tier took or had. corrupt: blocks refused and removed, by what was wrong. load_rate: bytes a
    second, of loads of many blocks; None before the first. load_latency: of each batch read; store_latency: of each
    batch written; lookup_latency: of each look-up that took I/O.
    """

    entries: int = 0
    bytes: int = 0
    max_bytes: int = 0
    bytes_by_owner: Mapping[str, int] = field(default_factory=dict)
    evictions: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    circuit: Circuit | None = None

    hits: int = 0
    misses: int = 0
    loads: int = 0
    stores: int = 0
    corrupt: Mapping[str, int] = field(default_factory=dict)
    load_rate: float | None = None
    load_latency: Latencies = Latencies()
    store_latency: Latencies = Latencies()
    lookup_latency: Latencies = Latencies()


MANY_BLOCKS = 64
"""A load of so many is what `TierStats.load_rate` is given for."""


@dataclass(frozen=True, slots=True)
class StackStats:
    """What the manager counts over all tiers. offered: blocks to offload. already_stored: of these, the ones that every
    tier had, skipped before any work. queue_full: those skipped because a tier's queue was full. queue_bytes: waiting
    to be written. failures: jobs that ended in an unexpected error, by the error's type; each is logged.
    """

    offered: int = 0
    already_stored: int = 0
    queue_full: int = 0
    queue_bytes: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)


class ErrorCounts:
    """Failures by kind, logged whenever their number reaches a power of two, so that they do not flood the log."""

    def __init__(self, log: logging.Logger, place: str) -> None:
        self._log = log
        self._place = place
        self.counts: Counter[str] = Counter()

    def count(self, kind: str, detail: str = "", times: int = 1) -> None:
        """detail: must say nothing of a block's content or its owner."""
        before = self.counts[kind]
        self.counts[kind] = now = before + times
        if now.bit_length() > before.bit_length():
            self._log.warning("%s: %s%s, %d so far", self._place, kind, detail and f" ({detail})", now)


class TierMeter:
    """Counters of one tier, for any number of threads. Times are in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = self._misses = self._loads = self._stores = self._stalls = 0
        self._corrupt: Counter[str] = Counter()
        self._load_latency = LatencyHistogram()
        self._store_latency = LatencyHistogram()
        self._lookup_latency = LatencyHistogram()
        self._rate = LatencyModel()
        self._block_bytes = 0

    def looked_up(self, hits: int, misses: int) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses

    def queried(self, seconds: float) -> None:
        """A look-up that took I/O has ended, or failed."""
        with self._lock:
            self._lookup_latency.observe(seconds)

    def loaded(self, blocks: int, seconds: float) -> None:
        """One batch was read, and ``blocks`` of it were sound."""
        with self._lock:
            self._loads += blocks
            self._load_latency.observe(seconds)

    def onboarded(self, blocks: int, size: int, seconds: float) -> None:
        """One load brought so many blocks, of ``size`` bytes together, from its first read to its last."""
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
        """Expected time to load so many; None before the first load."""
        with self._lock:
            return self._rate.seconds_for(blocks * self._block_bytes) if self._block_bytes else None

    def _load_rate(self) -> float | None:
        seconds = self._rate.seconds_for(MANY_BLOCKS * self._block_bytes) if self._block_bytes else None
        return MANY_BLOCKS * self._block_bytes / seconds if seconds else None

    def complete(self, stats: TierStats) -> TierStats:
        """The tier's own statistics, with the traffic added."""
        with self._lock:
            return replace(
                stats,
                hits=self._hits,
                misses=self._misses,
                loads=self._loads,
                stores=self._stores,
                corrupt=dict(self._corrupt),
                load_rate=self._load_rate(),
                errors={**stats.errors, **({"stalled": self._stalls} if self._stalls else {})},
                load_latency=self._load_latency.snapshot(),
                store_latency=self._store_latency.snapshot(),
                lookup_latency=self._lookup_latency.snapshot(),
            )
