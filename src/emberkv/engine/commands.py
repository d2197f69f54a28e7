"""What other threads may ask of the engine's cache, as data: a command for each question, and the type of its answer.

    future = loop.execute(CachedTokens(chain))   # on any thread
    future.result()                              # how many of the chain's tokens the pool has

`CacheControl` carries commands out, on the engine's thread and between two steps. Nothing else outside the engine
reaches the scheduler or the pool.
"""

import copy
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from emberkv.core.block import Block
from emberkv.core.block_pool import BlockPool
from emberkv.core.explaining.explain import look_up
from emberkv.core.explaining.explanation import CacheOutcome
from emberkv.core.feed import BATCH_EVENTS, CHUNK_BLOCKS, CacheFeed, EventBatch, EventsLost, SnapshotChunk
from emberkv.core.hashing import BlockHash, Chain
from emberkv.core.loading import LatencyModel, LowerTiers
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import BACKGROUND_PRIORITY, SequenceStatus
from emberkv.core.stats import SchedulerStats
from emberkv.engine.block_transfer import BlockTransfer, CachedRows, ImportedBlocks
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult
from emberkv.tiers.manager import TierManager

R = TypeVar("R")


class Command(Generic[R]):
    """Something to do between two steps, which ends with an ``R``."""

    __slots__ = ()


class Execute(Protocol):
    """`EngineLoop.execute`, or what stands for it."""

    def __call__(self, command: Command[R], /) -> "Future[R]": ...


@dataclass(frozen=True, slots=True)
class Retain(Command[int]):
    """Have the pool evict these blocks after all others, for so many seconds. Answer: how many blocks it retains."""

    block_hashes: Sequence[BlockHash]
    seconds: float = inf


@dataclass(frozen=True, slots=True)
class Unretain(Command[None]):
    """Have the pool evict these blocks like any others again."""

    block_hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class RemovedBlocks:
    """pool: blocks removed from the pool. tiers: the answers of the tiers, by name, which may wait for a disk."""

    pool: int
    tiers: "Mapping[str, Future[RemovalResult]]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Remove(Command[RemovedBlocks]):
    """Remove blocks from the pool and from all tiers below it; None: all blocks.

    No block moves between pool and tiers meanwhile, so none survives. tiers: False removes from the pool alone.
    """

    block_hashes: Collection[BlockHash] | None
    tiers: bool = True


@dataclass(frozen=True, slots=True)
class CachedTokens(Command[int]):
    """Answer: how many leading tokens of ``chain`` a longer prompt that begins with it would hit in the pool."""

    chain: Chain


@dataclass(frozen=True, slots=True)
class LookedUp:
    """hit_unit: hits are rounded down to a multiple of this many tokens. checkpoints: or end at a checkpoint."""

    outcome: CacheOutcome
    hit_unit: int
    checkpoints: bool = False


@dataclass(frozen=True, slots=True)
class LookUp(Command[LookedUp]):
    """Answer: what ``chain`` would hit as a prompt, in the pool and the tiers below, decided as for a request."""

    chain: Chain


@dataclass(frozen=True, slots=True)
class FindCached(Command[list[bool]]):
    """Answer: of each block, whether the pool or a tier below it has it, or the pool one that follows it."""

    block_hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """counters: since the start; a copy. bytes_by_owner: of cached blocks, by tenant; empty without shares.

    in_use: blocks of running sequences and loads. cached: free blocks that are cache entries still. empty: the others.
    """

    counters: SchedulerStats
    total: int
    in_use: int
    cached: int
    empty: int
    block_size: int
    bytes_by_owner: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Statistics(Command[PoolStatistics]):
    """Answer: counters and contents of the pool, as of now."""


@dataclass(frozen=True, slots=True)
class ExportBlocks(Command[list[bytes | None]]):
    """Answer: the record of each of the first of these blocks, from the pool or else from a tier below it.

    None for a block that neither has, and for those of a tier behind one that none has. Reading tiers takes at most
    `tier_link.READ_SECONDS`, while the engine goes on.

    As many as `block_transfer.MAX_BYTES` allows, and at least one: the caller asks again for the rest.
    """

    block_hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class ExportCheckpoint(Command[bytes | None]):
    """Answer: the record of the longest partial block behind the first ``position`` blocks of ``chain`` that holds its
    next tokens, from the pool or a tier, for the end of `ImportBlocks`. See `BlockTransfer.export_checkpoint`.
    """

    chain: Chain
    position: int


@dataclass(frozen=True, slots=True)
class ImportBlocks(Command[ImportedBlocks]):
    """Have the pool take in exported blocks of ``chain``, in order. See `BlockTransfer.take`."""

    chain: Chain
    records: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class ReadRows(Command[CachedRows]):
    """Answer: a layer's keys and values of the chain's tokens from ``start`` on, as far as the pool has them.

    Of as many blocks as `block_transfer.MAX_BYTES` allows: the caller asks again for the rest. layer: by its number
    among all layers of the model. Raises UnknownLayerError for one that the model has not, RequestError for one without
    attention.
    """

    chain: Chain
    layer: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class CountRows(Command[int]):
    """Answer: of how many of the chain's tokens `ReadRows` gives a layer's keys and values, over all pages. Raises as
    it does.
    """

    chain: Chain
    layer: int


@dataclass(frozen=True, slots=True)
class ReadEvents(Command[EventBatch | EventsLost]):
    """Answer: the first events, of the pool and its tiers, after number ``after``. See `CacheFeed.events`."""

    after: int
    limit: int = BATCH_EVENTS


@dataclass(frozen=True, slots=True)
class ReadSnapshot(Command[SnapshotChunk]):
    """Answer: a chunk of a snapshot of the blocks of the pool and its tiers. See `CacheFeed.snapshot`."""

    cursor: str = ""
    limit: int = CHUNK_BLOCKS
    tokens: bool = False


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do, and how fast it is at that: by this a router compares engines. Requests of
    `BACKGROUND_PRIORITY`, which make way for others, are left out.

    sequence: of the cache's last event. waiting, running: requests.

    waiting_tokens: of the prompts that wait, what the pool has not got, by an estimate. prefill_tokens: of the prompts
    that are being computed, what is left. decoding: requests of which each step computes one token. total_blocks,
    free_blocks, cached_blocks: of the pool; the cached ones are among the free, as are those that background requests
    alone hold. prefill_rate: prompt tokens a second. step_seconds: of a step that decodes and computes no prompt. Rates
    are None until they are measured.
    """

    sequence: int = 0
    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    prefill_tokens: int = 0
    decoding: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    prefill_rate: float | None = None
    step_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ReadLoad(Command[EngineLoad]):
    """Answer: what the engine has to do as of now, and how fast it is."""


class StepTimes:
    """How long steps take, by what they compute. It belongs to the engine's thread."""

    def __init__(self) -> None:
        self._prefill = LatencyModel()
        self._decode = LatencyModel()

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was computed in so many seconds."""
        model = self._prefill if plan.prefills else self._decode
        if plan.num_tokens:
            model.observe(plan.num_tokens, max(0.0, seconds))

    def prefill_rate(self, step_tokens: int) -> float | None:
        """Prompt tokens a second, in steps of so many."""
        seconds = self._prefill.seconds_for(step_tokens)
        return step_tokens / seconds if seconds else None

    def step_seconds(self, decoding: int) -> float | None:
        """Of a step that computes one token of each of so many requests."""
        return self._decode.seconds_for(max(1, decoding))


class CacheControl:
    """Carries out commands on a scheduler, on the thread that drives it.

    lower: the tiers below the pool, asked without being counted. manager: of the same tiers. clock: seconds, by which
    retention ends, as for the pool's policy. transfer: exports and imports blocks; None: it is refused. step_times: of
    the engine's steps, which the engine's loop fills in.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        lower: LowerTiers | None = None,
        manager: TierManager | None = None,
        clock: Callable[[], float] = time.monotonic,
        transfer: BlockTransfer | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._pool = scheduler.cache.pool
        self._lower = lower
        self._manager = manager
        self._clock = clock
        self._transfer = transfer
        self.step_times = StepTimes()
        self._feed = CacheFeed(self._pool, manager)
        self._handlers: dict[type[Command[Any]], Callable[[Any], Any]] = {
            Retain: self._retain,
            Unretain: self._unretain,
            Remove: self._remove,
            CachedTokens: self._cached_tokens,
            LookUp: self._look_up,
            FindCached: self._find_cached,
            Statistics: self._statistics,
            ReadEvents: self._read_events,
            ReadSnapshot: self._read_snapshot,
            ReadLoad: self._read_load,
            ExportBlocks: self._export,
            ExportCheckpoint: self._export_checkpoint,
            ImportBlocks: self._import,
            ReadRows: self._read_rows,
            CountRows: self._count_rows,
        }

    def execute(self, command: Command[R]) -> "R | Future[R]":
        """Carry out one command; raises what is wrong with it. The answer comes later where tiers are to be read."""
        answer: R | Future[R] = self._handlers[type(command)](command)
        return answer

    def _retain(self, command: Retain) -> int:
        return self._pool.retain(command.block_hashes, self._clock() + command.seconds)

    def _unretain(self, command: Unretain) -> None:
        self._pool.unretain(command.block_hashes)

    def _remove(self, command: Remove) -> RemovedBlocks:
        manager = self._manager if command.tiers else None
        if command.block_hashes is None:
            removed = self._pool.num_cached
            self._pool.clear()
            return RemovedBlocks(removed, manager.clear() if manager is not None else {})
        siblings = self._pool.cached.siblings_among(command.block_hashes)  # asked before they are gone
        removed = self._scheduler.remove(command.block_hashes)
        wanted = [*command.block_hashes, *siblings]
        return RemovedBlocks(removed, manager.remove(wanted) if manager is not None else {})

    def _cached_tokens(self, command: CachedTokens) -> int:
        return self._cache.cached_tokens(command.chain)

    def _look_up(self, command: LookUp) -> LookedUp:
        outcome = look_up(self._cache, self._lower, command.chain)
        return LookedUp(outcome, self._cache.hit_unit, self._cache.keeps_branches)

    def _find_cached(self, command: FindCached) -> list[bool]:
        return [self._is_cached(block_hash) for block_hash in command.block_hashes]

    def _is_cached(self, block_hash: BlockHash) -> bool:
        if self._pool.lookup(block_hash) is not None or self._pool.cached.has_children(block_hash):
            return True
        return self._lower is not None and bool(self._lower.find([block_hash], exact=False))

    def _statistics(self, command: Statistics) -> PoolStatistics:
        pool = self._pool
        counters = SchedulerStats(
            **{each.name: copy.copy(getattr(pool.stats, each.name)) for each in fields(SchedulerStats)}
        )
        return PoolStatistics(
            counters,
            total=pool.num_blocks,
            in_use=pool.num_blocks - pool.num_free,
            cached=pool.num_evictable,
            empty=pool.num_free - pool.num_evictable,
            block_size=pool.block_size,
            bytes_by_owner=dict(pool.policy.bytes_by_owner()),
        )

    def _read_events(self, command: ReadEvents) -> EventBatch | EventsLost:
        return self._feed.events(command.after, command.limit)

    def _read_snapshot(self, command: ReadSnapshot) -> SnapshotChunk:
        return self._feed.snapshot(command.cursor, command.limit, tokens=command.tokens)

    def _read_load(self, command: ReadLoad) -> EngineLoad:
        return load_of(self._scheduler, self.step_times)

    def _export(self, command: ExportBlocks) -> "Future[list[bytes | None]]":
        return self._transfers().export(command.block_hashes)

    def _export_checkpoint(self, command: ExportCheckpoint) -> "Future[bytes | None]":
        return self._transfers().export_checkpoint(command.chain, command.position)

    def _import(self, command: ImportBlocks) -> ImportedBlocks:
        return self._transfers().take(command.chain, command.records)

    def _read_rows(self, command: ReadRows) -> CachedRows:
        return self._transfers().read_rows(command.chain, command.layer, command.start)

    def _count_rows(self, command: CountRows) -> int:
        return self._transfers().count_rows(command.chain, command.layer)

    def _transfers(self) -> BlockTransfer:
        if self._transfer is None:
            raise ConfigError("this engine neither exports nor imports blocks; it was made without a BlockTransfer")
        return self._transfer


def load_of(scheduler: Scheduler, times: StepTimes) -> EngineLoad:
    """The load as of now. It takes some microseconds for each request in flight, and more for background requests."""
    pool = scheduler.cache.pool
    waiting_tokens = prefill_tokens = decoding = 0
    waiting, running = scheduler.num_waiting, scheduler.num_running
    background = Counter[Block]()  # the background requests that hold each block
    for sequence in scheduler.sequences:
        if sequence.priority >= BACKGROUND_PRIORITY:
            if sequence.lease is None:
                waiting -= 1
            else:
                running -= 1
                background.update(sequence.lease.blocks)
        elif sequence.status is SequenceStatus.DECODING:
            decoding += 1
        elif sequence.lease is not None:
            prefill_tokens += len(sequence.chain) - sequence.num_computed
        elif sequence.wants_prompt_logits or not scheduler.cache.enabled:
            waiting_tokens += len(sequence.chain)
        else:
            waiting_tokens += _uncached_tokens(pool, sequence.chain)
    return EngineLoad(
        sequence=pool.events.last_sequence,
        waiting=waiting,
        running=running,
        waiting_tokens=waiting_tokens,
        prefill_tokens=prefill_tokens,
        decoding=decoding,
        total_blocks=pool.num_blocks,
        free_blocks=pool.num_free + sum(block.ref_count == count for block, count in background.items()),
        cached_blocks=pool.num_evictable,
        prefill_rate=times.prefill_rate(scheduler.config.max_step_tokens),
        step_seconds=times.step_seconds(decoding),
    )


def _uncached_tokens(pool: BlockPool, chain: Chain) -> int:
    """By bisection, which takes a prompt to be cached up to a block that is."""
    cached = bisect_left(chain.block_hashes, True, key=lambda block_hash: pool.lookup(block_hash) is None)
    return len(chain) - cached * pool.block_size
