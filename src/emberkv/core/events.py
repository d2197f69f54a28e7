"""What changes in the set of cached blocks: numbered events, the log that keeps the last of them, and snapshots.

A copy of the index of a pool and its tiers (a router, a ledger) starts from a snapshot and applies the events that
follow it, in order.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from emberkv.core.hashing import BlockHash

POOL = "pool"
"""The name of the fastest tier, the KV pool of the engine."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks of one chain became visible in a tier. ``tokens`` holds each block's encoded token ids, or
    nothing: of lower tiers, and where the reader did not want them.
    """

    block_hashes: tuple[BlockHash, ...]
    parent: BlockHash
    tokens: tuple[bytes, ...]
    block_size: int
    tier: str = POOL


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks are no longer found under these hashes. evicted: their place was needed; else they were removed."""

    block_hashes: tuple[BlockHash, ...]
    evicted: bool = True
    tier: str = POOL


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """A barrier: nothing that was stored before it is cached any more."""

    tier: str = POOL


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventLog:
    """The last ``capacity`` events. A reader that fell behind starts again from a snapshot.

    The first event has number 1; numbers have no gaps. A log with a capacity of 0 has no readers: the cache makes no
    events for the blocks that it commits and evicts. epoch: names this log among all logs of all processes, so that a
    reader notices that numbers began again.
    """

    def __init__(self, capacity: int = 10_000, epoch: bytes = b"local") -> None:
        self.capacity = capacity
        self.epoch = epoch
        self.last_sequence = 0
        self._events: deque[Event] = deque(maxlen=capacity)

    @property
    def oldest_sequence(self) -> int:
        """The number of the first event that is still kept; of the next one where none is."""
        return self.last_sequence - len(self._events) + 1

    def append(self, event: Event) -> None:
        self.last_sequence += 1
        self._events.append(event)

    def require_snapshot(self) -> None:
        """Have every reader start from a snapshot, because blocks are cached that no event has reported."""
        self.last_sequence += 1
        self._events.clear()

    def since(self, sequence: int, limit: int | None = None) -> Sequence[Event] | None:
        """The events after ``sequence``, the first ``limit`` of them; None when some are no longer kept, or when there
        was no such event yet.
        """
        wanted = self.last_sequence - sequence
        if not 0 <= wanted <= len(self._events):
            return None
        latest = list(islice(reversed(self._events), wanted))  # from the end: most readers lack only a few
        latest.reverse()
        return latest if limit is None else latest[:limit]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every visible block hash with its parent, as of event ``sequence``."""

    sequence: int
    parents: dict[BlockHash, BlockHash]
