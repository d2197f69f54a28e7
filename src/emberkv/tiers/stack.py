"""The tiers below the pool as one: what is committed goes down in the background, what is asked for comes up verified.

`offer` and `find` never wait for a disk: one is a bounded queue before the writer's thread, the other a look into
memory. `fetch` reads on other threads. Whatever fails costs blocks, never a request: it is counted by kind and logged
without content.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from emberkv.core.promotion import Run
from emberkv.errors import BlockError, ConfigError
from emberkv.tiers.base import Tier, TierEntry
from emberkv.tiers.codec import BlockRecord, encode_record, verified_record
from emberkv.tiers.fetch import CHUNK_BLOCKS, Fetch, Loaders, Piece, Records, Timing
from emberkv.tiers.lookup import find_runs
from emberkv.tiers.meter import TierMeter
from emberkv.tiers.stats import StackStats, TierStats
from emberkv.tiers.writer import Writer

EvictionHook = Callable[[str, Sequence[bytes]], None]
"""Told the tier's name and the identities that left it for want of space, on the writer's thread."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A block to keep. owner: whose books it is on."""

    record: BlockRecord
    owner: str = ""


class TierStack:
    """The tiers, fastest first.

    namespace: of the model; blocks of another one are refused. queue_bytes: what may wait to be written. loaders:
    threads that read. clock: seconds, for rates and latencies. on_evicted: see `EvictionHook`. Raises ConfigError for
    two tiers of one name.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        namespace: bytes,
        queue_bytes: int,
        loaders: int = 2,
        clock: Callable[[], float] = time.perf_counter,
        on_evicted: EvictionHook | None = None,
    ) -> None:
        self._tiers = tuple(tiers)
        self._ranks = {tier.name: rank for rank, tier in enumerate(tiers)}
        if len(self._ranks) < len(self._tiers):
            raise ConfigError(f"tiers are called {[tier.name for tier in tiers]}; each needs a name of its own")
        self._namespace = namespace
        self._clock = clock
        self._on_evicted = on_evicted
        self._meters = [TierMeter() for _ in self._tiers]
        self._lock = threading.Lock()  # the counters below
        self._offered = self._already_stored = self._queue_full = 0
        self._failures: Counter[str] = Counter()
        self._removals = 0  # requests to remove; what was read before the latest one must not be stored again
        self._writer = Writer(queue_bytes, self._count_failure)
        self._loaders = Loaders(loaders, read=self._read, finish=self._finish, failed=self._count_failure)

    def find(self, identities: Sequence[bytes], *, exact: bool = False) -> list[Run]:
        """The longest consecutive run from the first identity on, each block from the fastest tier that has it.

        exact: only blocks that are bit-equal to a cold prefill's. Memory only, never I/O.
        """
        return find_runs(self._tiers, self._meters, identities, exact=exact)

    def peek(self, identities: Sequence[bytes], *, exact: bool = False) -> list[Run]:
        """What `find` would say, for whoever only asks: counted nowhere."""
        return find_runs(self._tiers, self._meters, identities, exact=exact, counted=False)

    def places(self, identity: bytes) -> list[str]:
        """The tiers that have a block, fastest first. Memory only, and counted nowhere."""
        return [tier.name for tier in self._tiers if tier.lookup((identity,))]

    def offer(self, offers: Sequence[Offer]) -> None:
        """Store these, in the background, in every tier that has not got them; skip and count those that do not fit
        into the queue.
        """
        stored = full = 0
        for offer in offers:
            record = offer.record
            if not self._lacking(record):
                stored += 1
            elif not self._writer.put(len(record.payload) + len(record.tokens), self._store, offer):
                full += 1
        with self._lock:
            self._offered += len(offers)
            self._already_stored += stored
            self._queue_full += full

    def touch(self, identities: Sequence[bytes]) -> None:
        """These are in use above, though nothing was loaded: make them the most recent of every tier, in the
        background, the first most of all. Skipped when the queue is full.
        """
        self._writer.put(sum(map(len, identities)), self._touch, identities)

    def fetch(self, identities: Sequence[bytes], runs: Sequence[Run], done: Callable[[Records], None]) -> Fetch:
        """Read the blocks that ``runs`` (of `find`) cover, and call ``done`` once, on another thread.

        ``done`` gets a record or None for each identity; only those before the first None are of use. A record's bytes
        are those that were stored, under that identity, which its parent and its tokens make up; whether the tokens are
        the caller's own is left to the caller. What comes from a slower tier is put into the faster ones.
        """
        pieces: list[Piece] = []
        first = 0
        for run in runs:
            stop = min(first + run.count, len(identities))
            rank = self._ranks[run.tier]
            pieces += [Piece(rank, at, min(at + CHUNK_BLOCKS, stop)) for at in range(first, stop, CHUNK_BLOCKS)]
            first = stop
        fetch = Fetch(identities, pieces, done)
        self._loaders.start(fetch)
        return fetch

    def remove(self, identities: Sequence[bytes]) -> "Future[dict[str, int]] | None":
        """Drop these from every tier, those offered before included. How many each had, by name; None after `close`."""
        self._removals += 1
        return self._writer.put(0, lambda: {tier.name: tier.remove(identities) for tier in self._tiers})

    def clear(self) -> "Future[dict[str, int]] | None":
        """Drop all blocks of this model, as `remove` does."""
        self._removals += 1
        return self._writer.put(0, lambda: {tier.name: tier.clear() for tier in self._tiers})

    def flush(self, timeout: float) -> bool:
        """Wait until all that was offered is stored; whether it is within ``timeout`` seconds."""
        return self._writer.flush(timeout)

    def stats(self) -> dict[str, TierStats]:
        """By the tier's name, fastest first."""
        return {tier.name: meter.complete(tier.stats()) for tier, meter in zip(self._tiers, self._meters, strict=True)}

    def stack_stats(self) -> StackStats:
        with self._lock:
            return StackStats(
                offered=self._offered,
                already_stored=self._already_stored,
                queue_full=self._queue_full,
                queue_bytes=self._writer.queued_bytes,
                failures=dict(self._failures),
            )

    def close(self, timeout: float) -> bool:
        """Cancel fetches, store what is queued, for ``timeout`` seconds each, and close the tiers.

        Whether all that was queued is stored. Afterwards nothing is stored or found any more.
        """
        self._loaders.close(timeout)
        all_stored = self._writer.close(timeout)
        for tier in self._tiers:
            tier.close()
        return all_stored

    def _lacking(self, record: BlockRecord) -> list[int]:
        """The ranks of the tiers in which this block is not, or only one that is less exact."""
        wanted = (record.identity,)
        return [rank for rank, tier in enumerate(self._tiers) if not tier.lookup(wanted, exact=record.exact)]

    def _store(self, offer: Offer) -> None:
        record = offer.record
        ranks = self._lacking(record)
        if ranks:
            data = encode_record(record, namespace=self._namespace)
            self._store_entry(ranks, TierEntry(record.identity, offer.owner, data, record.exact))

    def _promote(self, ranks: Sequence[int], entry: TierEntry, removals: int) -> None:
        if removals == self._removals:
            self._store_entry(ranks, entry)

    def _store_entry(self, ranks: Sequence[int], entry: TierEntry) -> None:
        for rank in ranks:
            tier = self._tiers[rank]
            began = self._clock()
            outcome = tier.store((entry,))
            self._meters[rank].stored(outcome.count, self._clock() - began)
            if outcome.evicted and self._on_evicted:
                self._on_evicted(tier.name, outcome.evicted)

    def _touch(self, identities: Sequence[bytes]) -> None:
        for tier in self._tiers:
            tier.touch(identities)

    def _read(self, fetch: Fetch, piece: Piece) -> Records:
        tier, meter = self._tiers[piece.rank], self._meters[piece.rank]
        identities = fetch.identities[piece.start : piece.stop]
        removals = self._removals
        began = self._clock()
        entries = tier.load(identities)
        records = [self._verified(piece.rank, entry) if entry else None for entry in entries]
        ended = self._clock()
        sound = [entry for entry, record in zip(entries, records, strict=True) if entry and record]
        meter.loaded(len(sound), ended - began)
        size = sum(len(entry.data) for entry in sound)
        fetch.timings.append(Timing(piece.rank, began, ended, len(sound), size))
        for entry in sound if piece.rank else ():
            self._writer.put(len(entry.data), self._promote, range(piece.rank), entry, removals)
        return records

    def _finish(self, fetch: Fetch) -> None:
        """Learn what it took, by tier, from the first read to the last, as reads overlap."""
        for rank, meter in enumerate(self._meters):
            timings = [timing for timing in fetch.timings if timing.rank == rank and timing.blocks]
            if timings:
                seconds = max(each.ended for each in timings) - min(each.began for each in timings)
                meter.fetched(sum(each.blocks for each in timings), sum(each.size for each in timings), seconds)
        fetch.done(list(fetch.records))

    def _verified(self, rank: int, entry: TierEntry) -> BlockRecord | None:
        """The record in an entry; one that is not what it should be leaves its tier."""
        try:
            return verified_record(entry.data, namespace=self._namespace, identity=entry.identity, exact=entry.exact)
        except BlockError as error:
            self._tiers[rank].remove((entry.identity,))
            self._meters[rank].refused(error.fault)
            return None

    def _count_failure(self, error: BaseException) -> None:
        with self._lock:
            self._failures[type(error).__name__] += 1
