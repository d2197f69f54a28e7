"""What is recorded of the engine's cache updates: a ledger of blocks, and estimates of hit rates at other sizes."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from emberkv.core.analytics.reuse_estimator import CurvePoint, ReuseEstimator
from emberkv.core.events import POOL, BlockRemoved, BlockStored, Event
from emberkv.core.explaining.explain import explain
from emberkv.core.explaining.explanation import CacheOutcome, Explanation
from emberkv.core.explaining.ledger import Ledger, LedgerView
from emberkv.core.hashing import BlockHash, TokenChain
from emberkv.engine.loop import CacheUpdate

MAX_RECORDS = 2000
COPIED_BLOCKS = 1000


class LedgerStore:
    """A `Ledger`, and the explanations of the last ``max_records`` prompts that were served, by request id.

    Updates are written in the order in which they arrive; one that arrives while the ledger is read is written with the
    next one, or before the next read. clock: seconds since 1970. below: the lower tiers that have a block, looked up
    for each block that a tier gives up.
    """

    def __init__(
        self, ledger: Ledger, *, clock: Callable[[], float] = time.time, max_records: int = MAX_RECORDS
    ) -> None:
        self.below: Callable[[BlockHash], Sequence[str]] = lambda _: ()
        self._ledger = ledger
        self._clock = clock
        self._max_records = max_records
        self._lock = threading.Lock()
        self._unwritten: deque[Callable[[Ledger], None]] = deque()
        self._explained: OrderedDict[str, Explanation] = OrderedDict()

    def apply(self, events: Sequence[Event]) -> None:
        """What changed in the pool and in the tiers."""
        now = self._clock()

        def write(ledger: Ledger) -> None:
            for event in events:
                ledger.apply(event, now)

        self._write(write)
        for event in events:
            if isinstance(event, BlockRemoved):
                self._still_below(event.block_hashes)

    def stored(self, tier: str, block_hashes: Sequence[BlockHash]) -> None:
        """What a lower tier has now."""
        self._write(lambda ledger: ledger.arrived(tier, block_hashes))

    def admitted(
        self,
        request_id: str,
        chain: TokenChain,
        prompt_tokens: int,
        outcome: CacheOutcome,
        *,
        hit_unit: int,
        checkpoints: bool = False,
    ) -> None:
        """A prompt is admitted. Call this before `apply` with the events of that step.

        hit_unit, checkpoints: as for `explain`.
        """
        now = self._clock()

        def write(ledger: Ledger) -> None:
            found = explain(
                ledger, chain, outcome, hit_unit=hit_unit, prompt_tokens=prompt_tokens, checkpoints=checkpoints
            )
            ledger.served(chain, found.hit_tokens // chain.block_size, now)
            self._explained[request_id] = found
            if len(self._explained) > self._max_records:
                self._explained.popitem(last=False)

        self._write(write)

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        """Blocks that were removed from the pool and every tier."""
        now = self._clock()
        self._write(lambda ledger: ledger.removed(block_hashes, now))

    def cleared(self, tier: str) -> None:
        """A lower tier was emptied."""
        now = self._clock()
        self._write(lambda ledger: ledger.cleared(tier, now))

    def explained(self, request_id: str) -> Explanation | None:
        """Of a prompt that was served; None when it was not, or too long ago."""
        found = self._explained.get(
            request_id
        )  # without the lock: the thread that answers the request must not wait for readers
        if found is None:
            with self.reading():
                found = self._explained.get(request_id)
        return found

    def copied(self) -> LedgerView:
        """A copy of the ledger, for readers that take long. The lock is given back after each `COPIED_BLOCKS`, so that
        what happens meanwhile may be seen of some blocks and not of others.
        """
        with self.reading() as ledger:
            view, block_hashes = ledger.begin_copy()
        for start in range(0, len(block_hashes), COPIED_BLOCKS):
            with self.reading() as ledger:
                ledger.copy_to(view, block_hashes[start : start + COPIED_BLOCKS])
            time.sleep(0)  # a thread that takes the lock at once again would be the next to have it
        return view

    @contextmanager
    def reading(self) -> Iterator[Ledger]:
        """The ledger, up to date, for as long as the context lasts."""
        with self._lock:
            self._catch_up()
            yield self._ledger

    def _still_below(self, block_hashes: Iterable[BlockHash]) -> None:
        for block_hash in block_hashes:
            for tier in self.below(block_hash):
                self.stored(tier, (block_hash,))

    def _write(self, update: Callable[[Ledger], None]) -> None:
        self._unwritten.append(update)
        if self._lock.acquire(blocking=False):
            try:
                self._catch_up()
            finally:
                self._lock.release()

    def _catch_up(self) -> None:
        while self._unwritten:
            self._unwritten.popleft()(self._ledger)


FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)
"""Sizes of which the hit rate is estimated, as multiples of the pool."""

MOST_WAITING = 1024
"""Admissions and stored blocks that wait at most, before they are taken in at once."""


def capacities_around(num_blocks: int, factors: Sequence[float] = FACTORS) -> list[int]:
    return sorted({max(1, round(num_blocks * factor)) for factor in factors})


class ReuseWatch:
    """An observer for `EngineLoop.on_update`: looks prompts up as they are admitted, and stores answers as their blocks
    fill. Updates wait for `apply_pending`, or for a reader, so that no answer waits for the look-up of its prompt. The
    curve may be read from any thread.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """The pool's blocks, and the bytes of one."""
        self.block_bytes = block_bytes
        self._estimator = ReuseEstimator(capacities_around(num_blocks))
        self._waiting: deque[tuple[Callable[[Sequence[BlockHash]], None], Sequence[BlockHash]]] = deque()
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """Updates that the estimator has not processed yet."""
        return len(self._waiting)

    def on_update(self, update: CacheUpdate) -> None:
        for sequence in update.admitted:
            full = sequence.prompt_tokens // sequence.chain.block_size
            self._waiting.append((self._estimator.access, sequence.chain.block_hashes[:full]))
        for event in update.events:
            if isinstance(event, BlockStored) and event.tier == POOL:
                self._waiting.append((self._estimator.keep, event.block_hashes))
        if len(self._waiting) > MOST_WAITING:
            self.apply_pending()

    def apply_pending(self) -> None:
        """Take in what waits. From any thread, when no other thread waits for this one."""
        with self._lock:
            self._catch_up()

    def curve(self) -> list[CurvePoint]:
        """Empty before there is traffic."""
        with self._lock:
            self._catch_up()
            return self._estimator.curve()

    def as_json(self) -> list[dict[str, Any]]:
        """The curve as JSON takes it."""
        return [
            {
                "cache_bytes": point.capacity_blocks * self.block_bytes,
                "cache_blocks": point.capacity_blocks,
                "estimated_hit_ratio": point.hit_rate,
                "standard_error": point.error,
            }
            for point in self.curve()
        ]

    def _catch_up(self) -> None:
        while self._waiting:
            take_in, block_hashes = self._waiting.popleft()
            take_in(block_hashes)
