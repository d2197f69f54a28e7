"""The cache's events for readers in other processes: batches that can be asked for again, and snapshots in chunks.

`emberkv.event_wire` writes these as bytes; `emberkv.cluster.feed.FeedReader` follows them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.block_pool import BlockPool
from emberkv.core.events import POOL, Event
from emberkv.core.hashing import BlockHash

BATCH_EVENTS = 1000
CHUNK_BLOCKS = 1000
MAX_SNAPSHOTS = 4
"""Snapshots that can be read at the same time; the one that began first is given up for another."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Consecutive events, the first of which has number ``first``. Without events, it says that ``first`` comes next.

    epoch: of the log (`EventLog.epoch`); numbers of different epochs have nothing to do with one another.
    """

    epoch: bytes
    first: int
    events: Sequence[Event]

    @property
    def last(self) -> int:
        return self.first + len(self.events) - 1


@dataclass(frozen=True, slots=True)
class EventsLost:
    """The events asked for are not kept any more: the log begins with ``oldest`` and ends with ``last``."""

    epoch: bytes
    oldest: int
    last: int


@dataclass(frozen=True, slots=True)
class SnapshotChunk:
    """Part of the blocks of one tier. cursor: what this chunk was asked for with; "" for a snapshot's first one.

    sequence: the last event before the chunk was taken; each chunk has its own. next_cursor: of the next chunk; None
    where this is the last. block_hashes, parents and tokens (where wanted, else empty) belong together by index;
    lower tiers know no parents and no tokens, which are then empty.
    """

    epoch: bytes
    sequence: int
    cursor: str
    next_cursor: str | None
    block_size: int
    block_hashes: tuple[BlockHash, ...]
    parents: tuple[BlockHash, ...]
    tokens: tuple[bytes, ...] = ()
    tier: str = POOL


FeedMessage = EventBatch | EventsLost | SnapshotChunk


class LowerContents(Protocol):
    """What is in the tiers below a pool, as far as these know it without I/O."""

    def contents(self) -> Mapping[str, Sequence[BlockHash]]:
        """The hashes of each tier's blocks, by its name; fastest first."""

    def tiers_of(self, block_hash: BlockHash) -> Sequence[str]:
        """The names of the tiers that have a block."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The blocks that one tier had when a snapshot began."""

    tier: str
    block_hashes: Sequence[BlockHash]


class CacheFeed:
    """The events and the content of a pool and the tiers below it, to be read in small parts.

    Belongs to the thread that drives the pool.

        feed = CacheFeed(pool)
        chunk = feed.snapshot()
        batch = feed.events(after=chunk.sequence)

    A snapshot is not taken at one moment: its first chunk notes which blocks there are, and each chunk says which of
    its part are still there. Applied in the order of their numbers, chunks and events give the content.
    """

    def __init__(self, pool: BlockPool, lower: LowerContents | None = None) -> None:
        self._pool = pool
        self._lower = lower
        self._log = pool.events
        self._snapshots: OrderedDict[str, list[_Part]] = OrderedDict()
        self._begun = 0

    def events(self, after: int, limit: int = BATCH_EVENTS) -> EventBatch | EventsLost:
        """The first events after number ``after``."""
        events = self._log.since(after, limit)
        if events is None:
            return EventsLost(self._log.epoch, self._log.oldest_sequence, self._log.last_sequence)
        return EventBatch(self._log.epoch, after + 1, events)

    def snapshot(self, cursor: str = "", limit: int = CHUNK_BLOCKS, *, tokens: bool = False) -> SnapshotChunk:
        """The chunk at ``cursor``; a new snapshot's first one for "" and for a cursor that is not known any more."""
        name, number, start = self._located(cursor)
        if name not in self._snapshots:
            name, number, start, cursor = self._begin(), 0, 0, ""
        parts = self._snapshots[name]
        part, stop = parts[number], start + limit
        if stop < len(part.block_hashes):
            following = f"{name}.{number}.{stop}"
        elif number + 1 < len(parts):
            following = f"{name}.{number + 1}.0"
        else:
            following = None
            del self._snapshots[name]
        some = part.block_hashes[start:stop]
        return (
            self._of_pool(some, cursor, following, tokens)
            if number == 0
            else self._below(part.tier, some, cursor, following)
        )

    def _located(self, cursor: str) -> tuple[str, int, int]:
        """The snapshot's name, the part's number and the place in it; "" for a cursor that is not known."""
        name, *rest = cursor.split(".")
        if name in self._snapshots and len(rest) == 2 and all(each.isdecimal() for each in rest):
            number, start = int(rest[0]), int(rest[1])
            parts = self._snapshots[name]
            if number < len(parts) and start <= len(parts[number].block_hashes):
                return name, number, start
        return "", 0, 0

    def _begin(self) -> str:
        self._begun += 1
        parts = [_Part(POOL, self._pool.cached_hashes())]
        if self._lower is not None:
            parts += [
                _Part(tier, block_hashes) for tier, block_hashes in self._lower.contents().items() if block_hashes
            ]
        name = str(self._begun)
        self._snapshots[name] = parts
        if len(self._snapshots) > MAX_SNAPSHOTS:
            self._snapshots.popitem(last=False)
        return name

    def _of_pool(
        self, block_hashes: Sequence[BlockHash], cursor: str, next_cursor: str | None, tokens: bool
    ) -> SnapshotChunk:
        blocks = [self._pool.lookup(block_hash) for block_hash in block_hashes]
        here = [block for block in blocks if block is not None and not block.partial]
        return SnapshotChunk(
            self._log.epoch,
            self._log.last_sequence,
            cursor,
            next_cursor,
            self._pool.block_size,
            tuple(block.block_hash for block in here if block.block_hash is not None),
            tuple(block.parent for block in here),
            tuple(block.tokens for block in here) if tokens else (),
        )

    def _below(
        self, tier: str, block_hashes: Sequence[BlockHash], cursor: str, next_cursor: str | None
    ) -> SnapshotChunk:
        lower = self._lower
        here = tuple(each for each in block_hashes if lower is not None and tier in lower.tiers_of(each))
        size = self._pool.block_size
        return SnapshotChunk(self._log.epoch, self._log.last_sequence, cursor, next_cursor, size, here, (), (), tier)
