"""Connects the pool's bytes to the tier manager: committed blocks are offloaded, loads are onboarded into their blocks.

All methods but `find`, `status` and `peeking` are for the engine's thread; none waits for a disk.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import inf

from emberkv.core.block import Block
from emberkv.core.events import Event
from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain
from emberkv.core.loading import BlockRun, LatencyModel, Load, LookupStatus, LowerTiers, PendingLookup, StoredPartial
from emberkv.engine.executor import KVStorage
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.onboarding import Onboarding, Query, Records
from emberkv.tiers.partial import PartialPlace
from emberkv.tiers.stats import ErrorCounts

_log = logging.getLogger(__name__)


FIRST_LOAD_SECONDS = 5.0
"""How long a load may take while it is not known how long computing its blocks would."""

READ_SECONDS = 5.0
"""How long reading blocks to export may take."""


@dataclass(slots=True, eq=False)
class _PendingLoad:
    """began, deadline: by the clock; at the deadline, the load ends with the blocks that have come."""

    load: Load
    onboarding: Onboarding
    began: float
    deadline: float


@dataclass(slots=True, eq=False)
class _PendingQuery:
    """deadline: by the clock; when it has passed, what is not answered is a miss."""

    query: Query
    deadline: float


@dataclass(frozen=True, slots=True)
class _PendingRead:
    """deadline: by the clock; when it has passed, the read ends with the blocks that have come."""

    onboarding: Onboarding
    deadline: float


class TierLink:
    """The `LowerTiers` of a scheduler, over a manager of tiers.

    step_tokens: how many prompt tokens a step computes when there is nothing else to do. exact: only blocks that are
    bit-equal to a cold prefill's are offloaded. clock: seconds. on_ended: called, on any thread, when
    `has_ended` may be True.

    errors: what went wrong with blocks on their way, by kind: ``tokens`` of another chain under the block hash asked
    for, a ``size`` that no block has, ``timeout`` of a load, no ``memory`` to copy it; and a ``lookup`` that no tier
    answered in time.
    """

    def __init__(
        self,
        manager: TierManager,
        blocks: KVStorage,
        *,
        step_tokens: int,
        exact: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manager = manager
        self.on_ended: Callable[[], None] = lambda: None
        self._errors = ErrorCounts(_log, "blocks between the pool and the tiers")
        self._blocks = blocks
        self._step_tokens = step_tokens
        self._exact = exact
        self._clock = clock
        self._prefill = LatencyModel()
        self._pending: dict[Load, _PendingLoad] = {}
        self._arrived: deque[tuple[Load, Records]] = deque()
        self._queries: dict[PendingLookup, _PendingQuery] = {}
        self._answered: deque[PendingLookup] = deque()
        self._reads: dict[Future[Records], _PendingRead] = {}
        self._read: deque[tuple[Future[Records], Records]] = deque()
        self._events: deque[Event] = deque()
        manager.on_event = self._tier_changed

    def find(self, block_hashes: Sequence[BlockHash], *, exact: bool) -> list[BlockRun]:
        return self.manager.find(block_hashes, exact=exact)

    def status(self, block_hash: BlockHash, *, exact: bool) -> LookupStatus:
        return self.manager.status(block_hash, exact=exact)

    def find_partial(self, chain: Chain, position: int, least: int, most: int) -> StoredPartial | None:
        first = position * chain.block_size
        parent, public_parent = chain.parent(position), chain.unsalted_parent(position)

        def tokens() -> bytes:
            return chain.encoded_slice(first, first + most)

        found = self.manager.find_partial(parent, tokens, range(least, most + 1))
        if public_parent == parent:
            return found
        longer = range(least if found is None else found.count + 1, most + 1)
        public = self.manager.find_partial(public_parent, tokens, longer, owner=PUBLIC_OWNER)
        return found if public is None else replace(public, public=True)

    @property
    def peeking(self) -> LowerTiers:
        """The same, for questions that are no request's: what they find is not counted."""
        return _Peeking(self)

    def recompute_seconds(self, tokens: int) -> float | None:
        """As many whole steps as that takes, and the rest."""
        steps, rest = divmod(tokens, self._step_tokens)
        whole, partial = self._prefill.seconds_for(self._step_tokens), self._prefill.seconds_for(rest)
        if whole is None or partial is None:
            return None
        return steps * whole + (partial if rest else 0.0)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step with a prompt in it computed so many tokens."""
        self._prefill.observe(tokens, max(0.0, seconds))

    def used(self, block_hashes: Sequence[BlockHash]) -> None:
        """These were hit in the pool, so make them as recent in the tiers."""
        if block_hashes:
            self.manager.touch(block_hashes)

    def offload(self, blocks: Sequence[Block]) -> None:
        """Have the tiers store these. Their bytes are copied out of the pool before this returns."""
        wanted = [block for block in blocks if (block.exact or not self._exact) and not block.partial]
        partial = [block for block in blocks if block.partial] if self.manager.keeps_partial else []
        for batch in ([wanted] if wanted else []) + [[block] for block in partial]:
            try:
                contents = self._contents(batch)
            except MemoryError as error:  # the blocks stay where they are
                self._count("memory", len(batch), str(error))
                continue
            pairs = zip(batch, contents, strict=True)
            self.manager.offload(
                [OffloadedBlock(record_of(block, content), block.owner, _place_of(block)) for block, content in pairs]
            )

    def _contents(self, blocks: Sequence[Block]) -> Sequence[memoryview]:
        """Of full blocks, or of a partial one."""
        if blocks[0].partial:
            return [self._blocks.read_beginning(block.block_id, block.num_tokens) for block in blocks]
        return self._blocks.read_blocks([block.block_id for block in blocks])

    def onboard(self, load: Load) -> None:
        """Have a load's blocks read, within its ``break_even_seconds``; `FIRST_LOAD_SECONDS` where none are known."""

        def done(records: Records) -> None:
            self._arrived.append((load, records))
            self.on_ended()

        seconds = FIRST_LOAD_SECONDS if load.break_even_seconds is None else load.break_even_seconds
        place = None
        if load.partial is not None:
            place = PartialPlace(load.partial_parent, load.chain.unsalted_parent(load.stop), load.partial.count)
        began = self._clock()
        onboarding = self.manager.onboard(list(load.block_hashes), load.all_runs, done, partial=place)
        self._pending[load] = _PendingLoad(load, onboarding, began, began + seconds)

    def read(self, block_hashes: Sequence[BlockHash], *, partial: PartialPlace | None = None) -> "Future[Records]":
        """Have blocks read that are not for the pool: those that the tiers have, up to the first that none has.

        The future is done in `completed` or `close`, after at most `READ_SECONDS`, with a record or None for each hash.
        partial: where the last block lies, if that is a partial one.
        """
        answer: Future[Records] = Future()
        answer.set_running_or_notify_cancel()

        def done(records: Records) -> None:
            self._read.append((answer, records))
            self.on_ended()

        deadline = self._clock() + READ_SECONDS
        runs = self.manager.peek(block_hashes)
        onboarding = self.manager.onboard(list(block_hashes), runs, done, partial=partial)
        self._reads[answer] = _PendingRead(onboarding, deadline)
        return answer

    def take_events(self) -> list[Event]:
        """What has changed in the tiers since the last call."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self) -> None:
        """End the reads that are pending, with what has come."""
        self._end_reads(inf)

    def _tier_changed(self, event: Event) -> None:
        self._events.append(event)
        self.on_ended()

    def look_up(self, lookup: PendingLookup) -> None:
        """Have the tiers look up what they cannot tell from memory, for as long as they and the look-up allow."""

        def done() -> None:
            self._answered.append(lookup)
            self.on_ended()

        began = self._clock()
        query = self.manager.ask(list(lookup.block_hashes), done, exact=lookup.exact)
        limit = lookup.break_even_seconds
        seconds = query.seconds if limit is None else min(query.seconds, limit)
        self._queries[lookup] = _PendingQuery(query, began + seconds)

    @property
    def errors(self) -> Counter[str]:
        return self._errors.counts

    @property
    def has_ended(self) -> bool:
        left = self.seconds_left
        return bool(self._arrived or self._answered or self._read) or (left is not None and left <= 0)

    @property
    def seconds_left(self) -> float | None:
        """Until the next deadline of a load, a look-up or a read; None where there is none."""
        deadlines = [pending.deadline for pending in self._pending.values()]
        deadlines += [pending.deadline for pending in self._queries.values()]
        deadlines += [pending.deadline for pending in self._reads.values()]
        return min(deadlines) - self._clock() if deadlines else None

    def completed(self) -> list[tuple[Load, list[bool]]]:
        """The loads that have ended since the last call, whose bytes are in their blocks now as far as they came.

        The flags are for `Scheduler.loaded`. A load whose deadline has passed ends here, with what has come by then.
        """
        results = []
        while self._arrived:
            load, records = self._arrived.popleft()
            if (ended := self._pending.pop(load, None)) is not None:
                load.took = self._clock() - ended.began
                results.append((load, self._place(load, records)))
        now = self._clock()
        for pending in [each for each in self._pending.values() if each.deadline <= now]:
            del self._pending[pending.load]
            records = self.manager.cancel(pending.onboarding)
            self._count("timeout", 1)
            pending.load.took = now - pending.began
            results.append((pending.load, self._place(pending.load, records)))
        self._end_reads(now)
        return results

    def _end_reads(self, now: float) -> None:
        while self._read:
            answer, records = self._read.popleft()
            if self._reads.pop(answer, None) is not None:
                answer.set_result(records)
        for answer, pending in [each for each in self._reads.items() if each[1].deadline <= now]:
            del self._reads[answer]
            answer.set_result(self.manager.cancel(pending.onboarding))

    def looked_up(self) -> list[PendingLookup]:
        """The look-ups that have ended since the last call: answered, or past their deadline."""
        ended = []
        while self._answered:
            lookup = self._answered.popleft()
            if self._queries.pop(lookup, None) is not None:
                ended.append(lookup)
        now = self._clock()
        for lookup, pending in [each for each in self._queries.items() if each[1].deadline <= now]:
            del self._queries[lookup]
            self.manager.cancel_query(pending.query)
            self._count("lookup", 1)
            ended.append(lookup)
        return ended

    def _place(self, load: Load, records: Records) -> list[bool]:
        """Write the leading records that are what the chain wants; whether each is exact."""
        exact = []
        for index, (block, record) in enumerate(zip(load.blocks, records, strict=False)):
            if record is None or not self._is_wanted(load, load.start + index, record):
                break
            try:
                self._blocks.write_block(block.block_id, record.payload)
            except MemoryError as error:  # what is not there is computed
                self._count("memory", 1, str(error))
                break
            exact.append(record.exact)
            load.keep_when_extended = record.keep_when_extended
        return exact

    def _is_wanted(self, load: Load, position: int, record: BlockRecord) -> bool:
        chain, partial = load.chain, load.partial
        if position < load.stop or partial is None:
            block_hash, parent = chain.block_hashes[position], chain.parent(position)
            tokens = chain.block_tokens(position)
        else:
            first = position * chain.block_size
            block_hash, parent = partial.block_hash, load.partial_parent
            tokens = chain.encoded_slice(first, first + partial.count)
        found = (record.block_hash, record.parent, record.position, record.tokens, record.partial)
        if found != (block_hash, parent, position, tokens, position == load.stop):
            self._count("tokens", 1)
        elif len(record.payload) != self._blocks.block_bytes:
            self._count("size", 1)
        else:
            return True
        return False

    def _count(self, kind: str, blocks: int, detail: str = "") -> None:
        self._errors.count(kind, detail, times=blocks)


class _Peeking:
    """`TierLink` for questions that no request asks."""

    def __init__(self, link: TierLink) -> None:
        self._link = link

    def find(self, block_hashes: Sequence[BlockHash], *, exact: bool) -> list[BlockRun]:
        return self._link.manager.peek(block_hashes, exact=exact)

    def status(self, block_hash: BlockHash, *, exact: bool) -> LookupStatus:
        return self._link.status(block_hash, exact=exact)

    def find_partial(self, chain: Chain, position: int, least: int, most: int) -> StoredPartial | None:
        return self._link.find_partial(chain, position, least, most)

    def recompute_seconds(self, tokens: int) -> float | None:
        return self._link.recompute_seconds(tokens)


def record_of(block: Block, content: memoryview) -> BlockRecord:
    """What a tier stores of a cached block. content: its KV bytes."""
    assert block.block_hash is not None
    return BlockRecord(
        block.block_hash,
        block.parent,
        block.tokens,
        block.position,
        block.exact,
        content,
        block.partial,
        block.keep_when_extended,
    )


def _place_of(block: Block) -> PartialPlace | None:
    """None of a full block."""
    if not block.partial:
        return None
    return PartialPlace(block.parent, block.previous, block.num_tokens)
