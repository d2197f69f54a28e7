"""The tiers below the pool: blocks are offloaded to all of them in the background, and onboarded from the fastest.

    offload ──> a queue for each tier ──> its worker's thread ──> Tier.store
    find    ──> the tiers' indexes, in memory
    ask     ──> the workers' readers ──> Tier.query, where a tier has no index in memory ──> done
    onboard ──> pieces, in turns ──> the workers' readers ──> Tier.load, verified ──> done
    remove  ──> struck out of all of these at once

A removal is final: it drops the records of onboardings in progress, and is queued behind what was stored before it;
what it names is not found from then on, nor does a block that was read before it reach a faster tier.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from emberkv.core.events import Event
from emberkv.core.hashing import partial_hashes
from emberkv.core.loading import BlockRun, LookupStatus, StoredPartial
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult, SharedStore, Tier
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.jobs import QueuedBlock, RemoveJob, StoreJob, TouchJob
from emberkv.tiers.onboarding import Onboarding, Piece, Query, Records
from emberkv.tiers.partial import PartialPlace
from emberkv.tiers.stats import StackStats, TierMeter, TierStats
from emberkv.tiers.worker import EventHook, ReadResult, TierWorker

logger = logging.getLogger(__name__)

MOST_COUNTS = 32
"""Of the numbers of tokens that a tier's partial blocks behind one block have, so many are looked at, those that came
last: behind a system prompt that all requests share there are hundreds, and each one is a hash for each admission."""


@dataclass(frozen=True, slots=True)
class OffloadedBlock:
    """A block to store. owner: the tenant whose share of the tiers it takes. partial: where it lies, if it is a partial
    block, which not all tiers store (`Tier.keeps_partial`).
    """

    record: BlockRecord
    owner: str = ""
    partial: PartialPlace | None = None


class TierManager:
    """The tiers, fastest first. No method waits for a disk but `flush` and `close`, which take a time limit.

    namespace: of the model; blocks of another one are refused. queue_bytes: what may wait to be stored in one tier.
    readers: threads that read from a tier. clock: seconds, for rates and latencies. start: False for tests that call
    the workers' methods themselves. Raises ConfigError for two tiers of one name.

    ``on_event`` may be set; it is called with what changes in a tier, on that tier's thread (`EventHook`). Nothing is
    reported of what other processes change in a folder that they share.

    The example of `emberkv.tiers` stores blocks and reads them back.

    >>> from emberkv.tiers import MemoryTier
    >>> manager = TierManager([MemoryTier(2**30)], namespace=b"dtypes, kernels", queue_bytes=2**28)
    >>> manager.find([b"a block's hash", b"the next block's hash"])
    []
    >>> manager.stats()["ram"].misses
    2
    >>> manager.close(timeout=60)
    True
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        namespace: bytes,
        queue_bytes: int,
        readers: int = 2,
        clock: Callable[[], float] = time.perf_counter,
        start: bool = True,
    ) -> None:
        self._ranks = {tier.name: rank for rank, tier in enumerate(tiers)}
        if len(self._ranks) < len(tiers):
            raise ConfigError(f"tiers are called {[tier.name for tier in tiers]}; each needs a name of its own")
        self.on_event: EventHook = lambda _: None
        self._lock = threading.Lock()  # the workers' queues, what is pending and the counters
        self._changed = threading.Condition(self._lock)
        self._pending: set[Onboarding | Query] = set()
        self._delivering = 0  # of those that have finished, the ones whose `done` has not returned
        self._closed = False
        self._offered = self._already_stored = self._queue_full = 0
        self._failures: Counter[str] = Counter()
        self.workers = tuple(
            TierWorker(
                tier,
                rank,
                lock=self._lock,
                changed=self._changed,
                namespace=namespace,
                queue_bytes=queue_bytes,
                clock=clock,
                on_read=self.read_ended,
                on_answer=self.query_ended,
                on_event=self._report,
                failed=self._count_failure,
            )
            for rank, tier in enumerate(tiers)
        )
        self._meters = [worker.meter for worker in self.workers]
        self._remote = [worker for worker in self.workers if worker.tier.lookup_seconds is not None]
        for worker in self.workers if start else ():
            worker.start(readers)

    def find(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> list[BlockRun]:
        """The longest run of blocks from the first hash on, each from the fastest tier that has it. No I/O.

        exact: only blocks that are bit-equal to a cold prefill's. Hits and misses are counted, unless the block after
        the run is PENDING (`status`): the caller then calls this again after `ask`.
        """
        if self._remote:
            runs = self.peek(block_hashes, exact=exact)
            after = block_hashes[sum(run.count for run in runs) :]
            if after and self.status(after[0], exact=exact) is LookupStatus.PENDING:
                return runs
        return find_runs(self.workers, self._meters, block_hashes, exact=exact)

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        """Of a block that `find` does not find: PENDING where `ask` makes a tier look it up, or else a MISS. No I/O."""
        pending = any(worker.status(block_hash, exact=exact) is LookupStatus.PENDING for worker in self._remote)
        return LookupStatus.PENDING if pending else LookupStatus.MISS

    def ask(self, block_hashes: Sequence[bytes], done: Callable[[], None], *, exact: bool = False) -> Query:
        """Have the tiers that cannot tell from memory look these up, the first of which is PENDING (`status`).

        ``done`` is called once, on any thread, when they have answered or failed; `find` then knows the answers, for
        `ANSWER_SECONDS`. The result's ``seconds`` say how long to wait for that before `cancel_query`.
        """
        with self._lock:
            pending = [] if self._closed else self._remote
            pending = [each for each in pending if each.status(block_hashes[0], exact=exact) is LookupStatus.PENDING]
            seconds = max((each.tier.lookup_seconds or 0.0 for each in pending), default=0.0)
            query = Query(block_hashes, {each.rank for each in pending}, seconds, done, exact)
            self._pending.add(query)
            for worker in pending:
                worker.ask(query)
            ended = self._ended()
        self._deliver(ended)
        return query

    def cancel_query(self, query: Query) -> None:
        """Wait no longer. A tier that is still at work on the answer is not searched until it has given it."""
        with self._lock:
            for worker in self._remote:
                worker.gave_up_query(query)
            query.cancel()
            ended = self._ended()
        self._deliver(ended)

    def peek(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> list[BlockRun]:
        """What `find` would return, without counting hits and misses."""
        return find_runs(self.workers, self._meters, block_hashes, exact=exact, counted=False)

    @property
    def keeps_partial(self) -> bool:
        """Whether any tier stores partial blocks."""
        return any(worker.tier.keeps_partial for worker in self.workers)

    def find_partial(
        self, parent: bytes, tokens: Callable[[], bytes], counts: range, *, owner: str | None = None
    ) -> StoredPartial | None:
        """The longest partial block behind a full one that holds the first tokens of a prompt's next block, from the
        fastest tier that has it, among those of `MOST_COUNTS` lengths of each tier. No I/O, and nothing is counted.

        parent: see `PartialPlace`. tokens: makes the prompt's next tokens, encoded, at least as many as the largest of
        ``counts``, which are the numbers of tokens that it may have. owner: whose it has to be; None: anyone's.
        """
        keeping = [worker for worker in self.workers if worker.tier.keeps_partial]
        known: set[int] = set()
        for worker in keeping:
            fitting = (count for count in reversed(worker.tier.partial_counts(parent)) if count in counts)
            known.update(islice(fitting, MOST_COUNTS))
        wanted = sorted(known, reverse=True)
        hashes = partial_hashes(parent, tokens(), wanted) if wanted else {}
        for count in wanted:
            block_hash = hashes[count]
            for worker in keeping:
                place = worker.tier.partial_place(block_hash)
                is_allowed = owner is None or worker.tier.partial_owner(block_hash) == owner
                if place is not None and is_allowed and worker.has(block_hash, exact=True, partial=place):
                    return StoredPartial(worker.name, block_hash, count, worker.meter.seconds_for(1))
        return None

    def tiers_of(self, block_hash: bytes) -> list[str]:
        """The names of the tiers that have a block, fastest first. No I/O, and nothing is counted."""
        return [worker.name for worker in self.workers if worker.lookup((block_hash,))]

    def contents(self) -> dict[str, list[bytes]]:
        """The hashes of each tier's blocks, by the tier's name, fastest first; as far as it knows them without I/O."""
        return {worker.name: worker.tier.block_hashes() for worker in self.workers}

    def offload(self, blocks: Sequence[OffloadedBlock]) -> None:
        """Store these in every tier that lacks them, in the background. A block that does not fit into a tier's queue
        is skipped there and counted.
        """
        stored = full = 0
        with self._lock:
            for block in blocks:
                lacking = self._lacking(block)
                queued = QueuedBlock(block.record, block.owner, partial=block.partial)
                stored += not lacking
                accepted = [
                    worker.put(StoreJob([queued], queued.size, worker.tier.removals_seen)) for worker in lacking
                ]
                full += not all(accepted)
            self._offered += len(blocks)
            self._already_stored += stored
            self._queue_full += full

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Make these the most recent of every tier, in the background, the first most of all, because the pool has
        served them. Skipped where a queue is full.
        """
        with self._lock:
            for worker in self.workers:
                worker.put(TouchJob(block_hashes, sum(map(len, block_hashes))))

    def onboard(
        self,
        block_hashes: Sequence[bytes],
        runs: Sequence[BlockRun],
        done: Callable[[Records], None],
        *,
        partial: PartialPlace | None = None,
    ) -> Onboarding:
        """Read the blocks that ``runs`` (of `find`) cover, and call ``done`` once, on any thread.

        ``done`` gets a record or None for each hash; only those before the first None are of use. A record's bytes are
        those that were stored, under that hash, which its parent and its tokens make up; whether the tokens are the
        caller's own is left to the caller. What comes from a slower tier is stored in the faster ones.

        partial: where the last block lies, if that is a partial one (of `find_partial`).
        """
        seen = [worker.tier.removals_seen for worker in self.workers]
        onboarding = Onboarding(block_hashes, runs, self._ranks, done, seen, partial=partial)
        with self._lock:
            if self._closed:
                onboarding.cancel()
            self._pending.add(onboarding)
            for worker in self.workers:
                worker.drop_removed(onboarding)
            for rank in onboarding.ranks:
                self.workers[rank].enqueue(onboarding)
            ended = self._ended()
        self._deliver(ended)
        return onboarding

    def cancel(self, onboarding: Onboarding) -> Records:
        """Read no further; the records so far. A tier that is still reading is not searched until it has answered."""
        with self._lock:
            for worker in self.workers:
                worker.gave_up(onboarding)
            onboarding.cancel()
            records = list(onboarding.records)
            ended = self._ended()
        self._deliver(ended)
        return records

    def remove(self, block_hashes: Collection[bytes]) -> dict[str, "Future[RemovalResult]"]:
        """Drop these from every tier, by its name. Final from the moment of return, see above; a block that is
        offloaded later is a new one.
        """
        return self._remove(frozenset(block_hashes))

    def clear(self) -> dict[str, "Future[RemovalResult]"]:
        """Drop all blocks of this model, as `remove` does."""
        return self._remove(None)

    def flush(self, timeout: float) -> bool:
        """Wait until the queues are empty; whether they are within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout)

    def shared(self) -> dict[str, SharedStore]:
        """The tiers whose blocks other processes find, too, by their names."""
        return {
            worker.name: SharedStore(
                worker.tier.store_id,
                is_listed=worker.tier.lookup_seconds is None,
                is_scanned=worker.tier.is_scanned,
            )
            for worker in self.workers
            if worker.tier.store_id is not None
        }

    def scan(self, name: str, cursor: int) -> tuple[list[bytes], int | None]:
        """Of a tier whose blocks `contents` does not list, some of them, as `Tier.scan` gives them: with I/O. Nothing
        where there is no such tier.
        """
        tier = next((worker.tier for worker in self._remote if worker.name == name), None)
        return tier.scan(cursor) if tier is not None else ([], None)

    def stats(self) -> dict[str, TierStats]:
        """By the tier's name, fastest first."""
        return {worker.name: worker.meter.complete(worker.tier.stats()) for worker in self.workers}

    def stack_stats(self) -> StackStats:
        with self._lock:
            return StackStats(
                offered=self._offered,
                already_stored=self._already_stored,
                queue_full=self._queue_full,
                queue_bytes=sum(worker.queued_bytes for worker in self.workers),
                failures=dict(self._failures),
            )

    def close(self, timeout: float) -> bool:
        """Cancel onboardings and look-ups, store what is queued, and close the tiers, within ``timeout`` seconds.

        Whether all that was queued is stored. Afterwards nothing is stored or found any more.
        """
        with self._changed:
            first, self._closed = not self._closed, True
            for pending in self._pending:
                pending.cancel()
            stuck = self._ended()
        self._deliver(stuck)
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle() and not self._pending and not self._delivering, timeout)
            all_stored = self._is_idle()
            for worker in self.workers:
                worker.close()
            stuck, self._pending = list(self._pending), set()
            self._delivering += len(stuck)
        self._deliver(stuck)
        for worker in self.workers if first else ():
            worker.tier.close()
        return all_stored

    def read_ended(self, worker: TierWorker, onboarding: Onboarding, piece: Piece, reading: ReadResult) -> None:
        """Take in a piece that a worker has read: pass it on, store it in faster tiers, check what is not sound."""
        with self._lock:
            worker.returned(onboarding, piece)
            onboarding.timings.append(reading.timing)
            kept = onboarding.end(piece, reading.records)
            if None in reading.records:
                unsound = onboarding.rest_of(piece, piece.start + reading.records.index(None))
                worker.check(unsound, onboarding.places)
            for entry, record in zip(reading.entries, kept, strict=False):
                if entry and record:
                    block = QueuedBlock(record, entry.owner, entry, entry.partial)
                    for faster, seen in zip(self.workers[: worker.rank], onboarding.removals_seen, strict=False):
                        if faster.keeps(record):
                            faster.put(StoreJob([block], block.size, seen))
            ended = self._ended()
        self._deliver(ended)

    def query_ended(self, worker: TierWorker, query: Query, count: int | None) -> None:
        """Take in a tier's answer to a look-up; None: it has failed."""
        with self._lock:
            worker.answered(query, count)
            ended = self._ended()
        self._deliver(ended)

    def _report(self, event: Event) -> None:
        self.on_event(event)

    def _remove(self, block_hashes: Collection[bytes] | None) -> dict[str, "Future[RemovalResult]"]:
        jobs = {worker.name: RemoveJob(block_hashes) for worker in self.workers}
        with self._lock:
            for pending in self._pending:
                pending.remove(block_hashes)
            for worker in self.workers:
                if self._closed or not worker.put(jobs[worker.name]):
                    jobs[worker.name].result.set_result(RemovalResult(reason="closed"))
            ended = self._ended()
        self._deliver(ended)
        return {name: job.result for name, job in jobs.items()}

    def _lacking(self, block: OffloadedBlock) -> list[TierWorker]:
        """The workers of the tiers in which this block is not, or only one that is less exact."""
        record = block.record
        return [
            worker
            for worker in self.workers
            if worker.keeps(record) and not worker.has(record.block_hash, exact=record.exact, partial=block.partial)
        ]

    def _is_idle(self) -> bool:
        return all(worker.idle for worker in self.workers)

    def _ended(self) -> list[Onboarding | Query]:
        """What is pending and has finished, taken out. The caller holds the lock."""
        ended = [each for each in self._pending if each.finished]
        self._pending.difference_update(ended)
        self._delivering += len(ended)
        return ended

    def _deliver(self, ended: Sequence[Onboarding | Query]) -> None:
        for each in ended:
            if isinstance(each, Onboarding):
                self._measure(each)
            try:
                each.deliver()
            except Exception as error:
                logger.exception("the receiver of onboarded blocks failed")
                self._count_failure(error)
            with self._lock:
                self._delivering -= 1
                self._changed.notify_all()

    def _measure(self, onboarding: Onboarding) -> None:
        """Learn how long it took, by tier, from the first read to the last, as reads overlap."""
        for rank, meter in enumerate(self._meters):
            timings = [timing for timing in onboarding.timings if timing.rank == rank and timing.blocks]
            if timings:
                seconds = max(each.ended for each in timings) - min(each.began for each in timings)
                meter.onboarded(sum(each.blocks for each in timings), sum(each.size for each in timings), seconds)

    def _count_failure(self, error: Exception) -> None:
        with self._lock:
            self._failures[type(error).__name__] += 1


class SearchableTier(Protocol):
    """The part of a tier that `find_runs` needs; a simulated tier has no more."""

    @property
    def name(self) -> str: ...

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int: ...


def find_runs(
    tiers: Sequence[SearchableTier],
    meters: Sequence[TierMeter],
    block_hashes: Sequence[bytes],
    *,
    exact: bool,
    counted: bool = True,
) -> list[BlockRun]:
    """The longest run of blocks from the first hash on, each from the fastest tier that has it.

    Counts a hit for that tier, and a miss for the faster ones; where no tier has a block, a miss for all, for that
    block and those after it. counted: False where no request is served, so that nothing is counted.
    """
    runs: list[BlockRun] = []
    position = 0
    while position < len(block_hashes):
        rank, count = _first_run(tiers, block_hashes[position:], exact)
        if counted:
            for meter in meters[:rank]:
                meter.looked_up(0, count)
            for meter in meters[rank : rank + 1]:
                meter.looked_up(count, 0)
        if rank == len(tiers):
            break
        runs.append(BlockRun(tiers[rank].name, count, meters[rank].seconds_for(count)))
        position += count
    return runs


def _first_run(tiers: Sequence[SearchableTier], block_hashes: Sequence[bytes], exact: bool) -> tuple[int, int]:
    """The rank of the fastest tier with the first block, and the blocks it has before a faster one has the next.

    All blocks, under the rank after the last, where no tier has the first.
    """
    for rank, tier in enumerate(tiers):
        count = tier.lookup(block_hashes, exact=exact)
        if count:
            faster = tiers[:rank]
            later = range(1, count) if faster else ()
            ends = (at for at in later if any(each.lookup(block_hashes[at : at + 1], exact=exact) for each in faster))
            return rank, next(ends, count)
    return len(tiers), len(block_hashes)
