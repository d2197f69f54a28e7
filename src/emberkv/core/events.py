"""What changes in the set of cached blocks, numbered, so that a router or a log can follow it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from emberkv.core.hashing import BlockHash


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks of one chain became visible. ``tokens`` holds each block's encoded token ids."""

    block_hashes: tuple[BlockHash, ...]
    parent: BlockHash
    tokens: tuple[bytes, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks are no longer found under these block hashes. evicted: their place was needed; else they were removed."""

    block_hashes: tuple[BlockHash, ...]
    evicted: bool = True


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class NumberedEvent:
    sequence: int
    event: Event


class EventLog:
    """The last ``capacity`` events. A reader that fell behind starts again from the pool's snapshot.

    The first event has number 1; numbers have no gaps. A log with a capacity of 0 has no readers: the cache
    makes no events for the blocks that it commits and evicts.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self.capacity = capacity
        self._events: deque[Event] = deque(maxlen=capacity)
        self.last_sequence = 0

    def append(self, event: Event) -> None:
        self.last_sequence += 1
        self._events.append(event)

    def since(self, sequence: int) -> Sequence[NumberedEvent] | None:
        """The events after ``sequence``; None when some are no longer kept, or when there was no such event yet."""
        wanted = self.last_sequence - sequence
        if not 0 <= wanted <= len(self._events):
            return None
        latest = list(islice(reversed(self._events), wanted))[::-1]  # from the end: most readers lack only a few
        return [NumberedEvent(number, event) for number, event in enumerate(latest, sequence + 1)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every visible block hash with its parent, as of event ``sequence``."""

    sequence: int
    parents: dict[BlockHash, BlockHash]
