"""A tier's worker: one thread that changes the tier in the order of its queue, and others that read it or query it.

Each tier has a worker of its own, so a slow tier holds up no other. The threads are daemons: one that waits for a disk
that never answers does not keep the process from ending.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from math import inf

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import TOKEN_BYTES
from emberkv.core.loading import LookupStatus
from emberkv.errors import BlockError, ForeignBlockError
from emberkv.tiers.base import RemovalResult, Tier, TierEntry
from emberkv.tiers.codec import BlockRecord, verified_record
from emberkv.tiers.jobs import CheckJob, Job, QueuedBlock, RemoveJob, StoreJob, TouchJob
from emberkv.tiers.onboarding import Onboarding, Piece, Query, Records, Timing
from emberkv.tiers.partial import PartialPlace
from emberkv.tiers.stats import TierMeter

logger = logging.getLogger(__name__)

BATCH_BLOCKS = 32
"""Blocks handed to a tier's `store` or checked at once."""

ANSWER_SECONDS = 2.0
"""How long a tier's answer to a query is taken for true. Other processes may store and evict blocks meanwhile; what an
older answer says is not far wrong, because a block that has gone is computed instead."""

MAX_KNOWN_BLOCKS = 65_536
"""Blocks that a worker remembers to have been in its tier, where no index in memory says so."""

Clock = Callable[[], float]
EventHook = Callable[[Event], None]
"""Called with what has changed in a tier, on the thread that changes it; it must return at once."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What reading a piece brought. records: None where a block is missing or not sound; empty where reading failed."""

    entries: list[TierEntry | None]
    records: Records
    timing: Timing


class TierWorker:
    """Queue and threads of one tier.

    rank: of the tier, 0 the fastest. changed: the condition of the manager's lock, which is held around all methods but
    `has`, `keeps`, `lookup`, `status`, `run`, `read` and `query`; notified when a job has ended.
    queue_bytes: limit of what may wait to be stored. on_read, on_answer: called with each `ReadResult` and each answer
    to a query, without the lock. on_event: an `EventHook`. failed: called with each error that no tier should raise.
    """

    def __init__(
        self,
        tier: Tier,
        rank: int,
        *,
        lock: threading.Lock,
        changed: threading.Condition,
        namespace: bytes,
        queue_bytes: int,
        clock: Clock,
        on_read: "ReadHook",
        on_answer: "AnswerHook",
        on_event: EventHook,
        failed: Callable[[Exception], None],
    ) -> None:
        self.tier = tier
        self.rank = rank
        self.meter = TierMeter()
        self.queued_bytes = 0
        self.closed = False
        self.lock = lock
        self._changed = changed
        self._namespace = namespace
        self._queue_bytes = queue_bytes
        self._clock = clock
        self._on_read = on_read
        self._on_answer = on_answer
        self._on_event = on_event
        self._failed = failed
        self._writable = threading.Condition(lock)
        self._readable = threading.Condition(lock)
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._hidden: tuple[CheckJob | RemoveJob, ...] = ()
        self._turns: deque[Onboarding] = deque()
        self._queries: deque[Query] = deque()
        self._querying: set[Query] = set()
        self._answers: dict[tuple[bytes, bool], tuple[bool, float]] = {}
        """By hash and whether only an exact block counts: whether it is there, and until when that is taken for true;
        the oldest first."""
        self._stalled: set[tuple[Onboarding, Piece] | Query] = set()
        self._known: dict[bytes, None] = {}  # of a tier that is queried: blocks that were there, the latest last

    @property
    def name(self) -> str:
        return self.tier.name

    @property
    def idle(self) -> bool:
        """Nothing waits to be changed, and nothing is being changed."""
        return not self._jobs and self._running is None

    def start(self, readers: int) -> None:
        for number, target in enumerate((self._write_loop, *[self._read_loop] * readers)):
            name = f"emberkv-{self.name}-{f'reader-{number}' if number else 'writer'}"
            threading.Thread(target=target, name=name, daemon=True).start()

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """As the tier's, without what is being removed or checked; nothing while a read that was given up is stuck."""
        if self._stalled or self.closed:
            return 0
        for job in self._hidden:
            block_hashes = block_hashes[: next((at for at, each in enumerate(block_hashes) if job.hides(each)), None)]
        count = self.tier.lookup(block_hashes, exact=exact)
        while self._answers and count < len(block_hashes) and self._answer(block_hashes[count], exact):
            count += 1 + self.tier.lookup(block_hashes[count + 1 :], exact=exact)
        return count

    def keeps(self, record: BlockRecord) -> bool:
        """Whether the tier stores blocks of this kind."""
        return self.tier.keeps_partial or not record.partial

    def has(self, block_hash: bytes, *, exact: bool, partial: PartialPlace | None) -> bool:
        """As `lookup`, of one block. partial: where it lies, if it is a partial one: it may be removed with others."""
        if partial is not None and any(job.hides_at(partial) for job in self._hidden):
            return False
        return bool(self.lookup((block_hash,), exact=exact))

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        """Of a block that `lookup` does not find: PENDING where a query may find it."""
        hidden = self._stalled or self.closed or any(job.hides(block_hash) for job in self._hidden)
        if hidden or self._answer(block_hash, exact) is not None:
            return LookupStatus.MISS
        return self.tier.status(block_hash, exact=exact)

    def _answer(self, block_hash: bytes, exact: bool) -> bool | None:
        """What the tier answered when it was queried; None where it was not, or too long ago."""
        there, until = self._answers.get((block_hash, exact), (False, -inf))
        return there if self._clock() < until else None

    def put(self, job: Job) -> bool:
        """Queue a job; False where its size does not fit, or after `close`."""
        if self.closed or (job.size and self.queued_bytes + job.size > self._queue_bytes):
            return False
        self.queued_bytes += job.size
        if isinstance(job, CheckJob | RemoveJob):
            self._hidden = (*self._hidden, job)
            self._forget(self._known.copy() if job.block_hashes is None else job.block_hashes)
            self._answers = {key: each for key, each in self._answers.items() if not job.hides(key[0])}
            for query in self._querying:  # one that is given up is not the manager's any more, but still remembered
                query.remove(job.block_hashes)
        self._jobs.append(job)
        self._writable.notify()
        return True

    def check(self, block_hashes: Iterable[bytes], partial: Mapping[bytes, PartialPlace]) -> None:
        """Queue a check of those that no job in the queue hides already. partial: see `CheckJob`."""
        unchecked = [each for each in block_hashes if not any(job.hides(each) for job in self._hidden)]
        if unchecked:
            self.put(CheckJob(frozenset(unchecked), partial))

    def take(self) -> Job | None:
        """The next job to `run`, with the stores that follow a store, to be followed by `finish`."""
        if not self._jobs:
            return None
        job = self._jobs.popleft()
        if isinstance(job, StoreJob):
            while self._jobs and isinstance(after := self._jobs[0], StoreJob) and len(job.blocks) < BATCH_BLOCKS:
                job = StoreJob([*job.blocks, *after.blocks], job.size + after.size, min(job.seen, after.seen))
                self._jobs.popleft()
        self._running = job
        return job

    def run(self, job: Job) -> None:
        """Change the tier."""
        match job:
            case StoreJob(blocks=blocks, seen=seen):
                self._store(blocks, seen)
            case TouchJob(block_hashes=block_hashes):
                self.tier.touch(block_hashes)
            case CheckJob(block_hashes=block_hashes, partial=partial):
                self._check(list(block_hashes), partial)
            case RemoveJob(block_hashes=None, result=result):
                removed = self.tier.clear()
                self._on_event(AllBlocksCleared(self.name))
                result.set_result(removed)
            case RemoveJob(block_hashes=block_hashes, result=result):
                known = self.tier.lookup_seconds is None  # else any of them may have been there
                full = [each for each in block_hashes or () if self.tier.partial_place(each) is None]
                present = [each for each in full if not known or self.tier.lookup((each,))]
                removed = self.tier.remove(list(block_hashes or ()))
                self._report_removed(present)
                result.set_result(removed)

    def finish(self, job: Job) -> None:
        self._running = None
        self.queued_bytes -= job.size
        self._hidden = tuple(each for each in self._hidden if each is not job)
        if isinstance(job, StoreJob):
            stored = frozenset(block.record.block_hash for block in job.blocks)
            for block_hash in stored if self._answers else ():  # they may be there now
                for exact in (False, True):
                    self._answers.pop((block_hash, exact), None)
            for query in self._querying:
                query.stored(stored)
        self._changed.notify_all()

    def enqueue(self, onboarding: Onboarding) -> None:
        """Have this tier's part of it read, in turns with other onboardings."""
        self._turns.append(onboarding)
        self._readable.notify_all()

    def ask(self, query: Query) -> None:
        """Have the tier answer, before anything more is read from it."""
        for job in self._hidden:
            query.remove(job.block_hashes)
        self._queries.append(query)
        self._readable.notify_all()

    def begin_query(self) -> Query | None:
        """The next query to put to the tier by `query`, to be followed by `answered`; None where there is none."""
        while self._queries:
            query = self._queries.popleft()
            if self.rank in query.ranks:
                self._querying.add(query)
                return query
        return None

    def query(self, query: Query) -> int | None:
        """How many blocks are there, from the first on; None where the tier fails."""
        began = self._clock()
        try:
            return self.tier.query(query.block_hashes, exact=query.exact)
        except Exception as error:
            logger.exception("%s tier: a look-up failed and counts as a miss", self.name)
            self._failed(error)
            return None
        finally:
            self.meter.queried(self._clock() - began)

    def answered(self, query: Query, count: int | None) -> None:
        """Remember an answer for a while, one that comes too late for its query included. None: the tier has failed,
        which says nothing of any block.
        """
        self._querying.discard(query)
        self._stalled.discard(query)
        query.ranks.discard(self.rank)
        now = self._clock()
        for key in [key for key, _ in takewhile(lambda item: item[1][1] <= now, self._answers.items())]:
            del self._answers[key]
        found = []
        for block_hash, there in query.answers(count) if count is not None else ():
            self._answers.pop((block_hash, query.exact), None)
            self._answers[block_hash, query.exact] = (there, now + ANSWER_SECONDS)
            if there:
                found.append(block_hash)
            elif not query.exact and block_hash in self._known:
                self._report_lost(block_hash)
        self._remember(found)

    def _remember(self, block_hashes: Iterable[bytes]) -> None:
        """These are in the tier. A later look-up that does not find one reports that the tier has lost it."""
        if self.tier.lookup_seconds is None:
            return
        for block_hash in block_hashes:
            self._known.pop(block_hash, None)
            self._known[block_hash] = None
        for block_hash in list(islice(self._known, max(0, len(self._known) - MAX_KNOWN_BLOCKS))):
            del self._known[block_hash]

    def _forget(self, block_hashes: Iterable[bytes]) -> None:
        for block_hash in block_hashes:
            self._known.pop(block_hash, None)

    def _report_lost(self, block_hash: bytes) -> None:
        """The tier does not find a block any more. It has lost it, if it is up, and the block is not being stored."""
        jobs = (self._running, *self._jobs)
        stores = any(
            isinstance(job, StoreJob) and any(each.record.block_hash == block_hash for each in job.blocks)
            for job in jobs
        )
        if not stores and self.tier.status(block_hash) is LookupStatus.PENDING:
            self._forget((block_hash,))
            self._on_event(BlockRemoved((block_hash,), tier=self.name))

    def drop_removed(self, onboarding: Onboarding) -> None:
        """Blocks whose removal is queued are still in the tier, but not to be read any more."""
        for job in self._hidden:
            if isinstance(job, RemoveJob):
                onboarding.remove(job.block_hashes, rank=self.rank)

    def begin_read(self) -> tuple[Onboarding, Piece] | None:
        """The next piece to `read`, to be followed by `Onboarding.end`; None where there is none."""
        while self._turns:
            onboarding = self._turns.popleft()
            piece = onboarding.begin(self.rank)
            if piece is not None:
                self._turns.append(onboarding)
                return onboarding, piece
        return None

    def read(self, onboarding: Onboarding, piece: Piece) -> ReadResult:
        began = self._clock()
        entries: list[TierEntry | None] = []
        records: Records = []
        places = onboarding.places
        try:
            entries = self.tier.load(onboarding.block_hashes[piece.start : piece.stop])
            records = [self._sound(entry, places) if entry else None for entry in entries]
        except Exception as error:
            logger.exception("%s tier: blocks could not be read; they are computed instead", self.name)
            self._failed(error)
        ended = self._clock()
        sound = [entry for entry, record in zip(entries, records, strict=False) if entry and record]
        self.meter.loaded(len(sound), ended - began)
        timing = Timing(piece.rank, began, ended, len(sound), sum(len(entry.data) for entry in sound))
        return ReadResult(entries, records, timing)

    def gave_up(self, onboarding: Onboarding) -> None:
        """The request for these blocks does not wait any more for what is being read."""
        stuck = {(onboarding, piece) for piece in onboarding.reading if piece.rank == self.rank}
        if stuck:
            self._stalled |= stuck
            self.meter.stalled()

    def gave_up_query(self, query: Query) -> None:
        """The request does not wait any more for the answer: one that the tier is at work on keeps it from being
        searched until it has come.
        """
        if query in self._querying:
            self._stalled.add(query)
            self.meter.stalled()

    def returned(self, onboarding: Onboarding, piece: Piece) -> None:
        """A read has ended, so the tier answers."""
        self._stalled.discard((onboarding, piece))

    def close(self) -> None:
        """End the threads, those that wait for the disk excepted, and drop what is queued."""
        self.closed = True
        for job in self._jobs:
            self.queued_bytes -= job.size
            if isinstance(job, RemoveJob):
                job.result.set_result(RemovalResult(reason="closed"))
        self._jobs.clear()
        self._turns.clear()
        self._queries.clear()
        self._writable.notify_all()
        self._readable.notify_all()
        self._changed.notify_all()

    def _write_loop(self) -> None:
        every = self.tier.refresh_seconds
        due = time.monotonic() + every if every is not None else None
        while True:
            with self.lock:
                if not self._jobs and not self.closed:
                    self._writable.wait(None if due is None else max(0.0, due - time.monotonic()))
                if self.closed:
                    return
                job = self.take()
            if job is not None:
                self._run_guarded(job)
                with self.lock:
                    self.finish(job)
            if every is not None and due is not None and time.monotonic() >= due:
                self._guard(self._refresh)
                due = time.monotonic() + every

    def _read_loop(self) -> None:
        while True:
            with self.lock:
                while (turn := self.begin_query() or self.begin_read()) is None and not self.closed:
                    self._readable.wait()
            if turn is None:
                return
            if isinstance(turn, Query):
                self._on_answer(self, turn, self.query(turn))
            else:
                self._on_read(self, *turn, self.read(*turn))

    def _run_guarded(self, job: Job) -> None:
        error = self._guard(lambda: self.run(job))
        if error is not None and isinstance(job, RemoveJob):
            job.result.set_result(RemovalResult(reason=f"failed: {type(error).__name__}"))

    def _guard(self, change: Callable[[], None]) -> Exception | None:
        try:
            change()
        except Exception as error:
            logger.exception("%s tier: a change failed", self.name)
            self._failed(error)
            return error
        return None

    def _refresh(self) -> None:
        self.tier.refresh()
        if self.tier.was_emptied():
            with self.lock:
                self._known.clear()
            self._on_event(AllBlocksCleared(self.name))
        if lost := self.tier.lost_blocks():
            with self.lock:
                self._forget(lost)
            self._on_event(BlockRemoved(tuple(lost), tier=self.name))

    def _store(self, blocks: Sequence[QueuedBlock], seen: int) -> None:
        lacking = [each for each in blocks if not self.tier.lookup((each.record.block_hash,), exact=each.record.exact)]
        if not lacking:
            return
        entries = [each.encoded(self._namespace) for each in lacking]
        began = self._clock()
        outcome = self.tier.store(entries, seen=seen)
        self.meter.stored(outcome.count, self._clock() - began)
        stored = [each.record for each in lacking]
        if outcome.count < len(stored):
            stored = [each for each in stored if self.tier.query((each.block_hash,))]
        with self.lock:
            self._remember(each.block_hash for each in stored if not each.partial)
            self._forget(outcome.evicted)
        for event in _stored_events(self.name, [each for each in stored if not each.partial]):
            self._on_event(event)
        if outcome.evicted:
            self._on_event(BlockRemoved(tuple(outcome.evicted), tier=self.name))

    def _check(self, block_hashes: Sequence[bytes], partial: Mapping[bytes, PartialPlace]) -> None:
        is_known = self.tier.lookup_seconds is None  # else a block that does not come may be there all the same
        removed = []
        for start in range(0, len(block_hashes), BATCH_BLOCKS):
            batch = block_hashes[start : start + BATCH_BLOCKS]
            for block_hash, entry in zip(batch, self.tier.load(batch), strict=True):
                fault = self._fault(entry, partial) if entry else ""
                if fault:
                    self.tier.remove((block_hash,), remember=False)
                    self.meter.refused(fault)
                if fault or (is_known and not self.tier.lookup((block_hash,))):
                    removed.append(block_hash)
        self._report_removed([block_hash for block_hash in removed if block_hash not in partial])

    def _report_removed(self, block_hashes: Sequence[bytes]) -> None:
        """Of full blocks: events tell of no others."""
        if block_hashes:
            self._on_event(BlockRemoved(tuple(block_hashes), evicted=False, tier=self.name))

    def _sound(self, entry: TierEntry, partial: Mapping[bytes, PartialPlace]) -> BlockRecord | None:
        try:
            return self._verified(entry, partial)
        except BlockError:
            return None

    def _fault(self, entry: TierEntry, partial: Mapping[bytes, PartialPlace]) -> str:
        try:
            self._verified(entry, partial)
        except BlockError as error:
            return error.fault
        return ""

    def _verified(self, entry: TierEntry, partial: Mapping[bytes, PartialPlace]) -> BlockRecord:
        """The record of an entry. partial: where the partial blocks lie that a request asks for, by hash: the tier has
        to keep them there, because a record does not say which full block it follows, and removals go by that.
        """
        record = verified_record(
            entry.data,
            namespace=self._namespace,
            block_hash=entry.block_hash,
            exact=entry.exact,
            partial=entry.partial,
        )
        if entry.partial != partial.get(entry.block_hash, entry.partial):
            raise ForeignBlockError("kept behind another block than the one that it follows", fault="place")
        return record


def _stored_events(tier: str, records: Sequence[BlockRecord]) -> Iterator[BlockStored]:
    """One event for each run of consecutive blocks of a chain."""
    start = 0
    for stop in range(1, len(records) + 1):
        if stop == len(records) or records[stop].parent != records[stop - 1].block_hash:
            run = records[start:stop]
            block_size = len(run[0].tokens) // TOKEN_BYTES
            yield BlockStored(tuple(each.block_hash for each in run), run[0].parent, (), block_size, tier)
            start = stop


AnswerHook = Callable[[TierWorker, Query, int | None], None]
ReadHook = Callable[[TierWorker, Onboarding, Piece, ReadResult], None]
