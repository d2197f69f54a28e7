"""A pool's events for readers that are elsewhere: batches that can be asked for again, and snapshots in chunks.

`emberkv.event_wire` writes these as bytes; `emberkv.cluster.feed.FeedReader` follows them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Part of the cached blocks. cursor: what this chunk was asked for with; "" for a snapshot's first one.

    sequence: the last event before the chunk was taken; each chunk has its own. next_cursor: of the next chunk; None
    where this is the last. block_hashes, parents and tokens (where wanted, else empty) belong together by index.
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


class CacheFeed:
    """The events and the content of one pool, to be read in small parts. Belongs to the thread that drives the pool.

        feed = CacheFeed(pool)
        chunk = feed.snapshot()
        batch = feed.events(after=chunk.sequence)

    A snapshot is not taken at one moment: its first chunk notes which blocks there are, and each chunk says which of
    its part are still there. Applied in the order of their numbers, chunks and events give the pool's content.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._log = pool.events
        self._snapshots: OrderedDict[str, list[BlockHash]] = OrderedDict()
        self._begun = 0

    def events(self, after: int, limit: int = BATCH_EVENTS) -> EventBatch | EventsLost:
        """The first events after number ``after``."""
        events = self._log.since(after, limit)
        if events is None:
            return EventsLost(self._log.epoch, self._log.oldest_sequence, self._log.last_sequence)
        return EventBatch(self._log.epoch, after + 1, events)

    def snapshot(self, cursor: str = "", limit: int = CHUNK_BLOCKS, *, tokens: bool = False) -> SnapshotChunk:
        """The chunk at ``cursor``; a new snapshot's first one for "" and for a cursor that is not known any more."""
        name, _, offset = cursor.partition(".")
        known = self._snapshots.get(name)
        if known is None or not offset.isdecimal() or int(offset) > len(known):
            name, known, start, cursor = *self._begin(), 0, ""
        else:
            start = int(offset)
        stop = start + limit
        if stop >= len(known):
            self._snapshots.pop(name, None)
        blocks = [self._pool.lookup(block_hash) for block_hash in known[start:stop]]
        here = [block for block in blocks if block is not None and not block.partial]
        return SnapshotChunk(
            self._log.epoch,
            self._log.last_sequence,
            cursor,
            f"{name}.{stop}" if stop < len(known) else None,
            self._pool.block_size,
            tuple(block.block_hash for block in here if block.block_hash is not None),
            tuple(block.parent for block in here),
            tuple(block.tokens for block in here) if tokens else (),
        )

    def _begin(self) -> tuple[str, list[BlockHash]]:
        self._begun += 1
        name, known = str(self._begun), self._pool.cached_hashes()
        self._snapshots[name] = known
        if len(self._snapshots) > MAX_SNAPSHOTS:
            self._snapshots.popitem(last=False)
        return name, known
