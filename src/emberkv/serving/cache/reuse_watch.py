"""Estimates what caches of other sizes would find of the traffic that is served."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from emberkv.core.analytics.reuse_estimator import CurvePoint, ReuseEstimator
from emberkv.core.events import POOL, BlockStored
from emberkv.core.hashing import BlockHash
from emberkv.engine.loop import CacheUpdate

FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)
"""Sizes of which the hit rate is estimated, as multiples of the pool."""

MOST_WAITING = 1024
"""Admissions and stored blocks that wait at most, before they are taken in at once."""


def capacities_around(num_blocks: int, factors: Sequence[float] = FACTORS) -> list[int]:
    return sorted({max(1, round(num_blocks * factor)) for factor in factors})


class ReuseWatch:
    """An observer for `EngineLoop.on_update`: looks prompts up as they are admitted, and stores answers as their blocks
    fill. Updates wait for `settle`, or for a reader, so that no answer waits for the look-up of its prompt. The curve
    may be read from any thread.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """The pool's blocks, and the bytes of one."""
        self.block_bytes = block_bytes
        self._estimator = ReuseEstimator(capacities_around(num_blocks))
        self._waiting: deque[tuple[Callable[[Sequence[BlockHash]], None], Sequence[BlockHash]]] = deque()
        self._lock = Lock()

    @property
    def waiting(self) -> int:
        """What it was told and has not taken in yet."""
        return len(self._waiting)

    def on_update(self, update: CacheUpdate) -> None:
        for sequence in update.admitted:
            full = sequence.prompt_tokens // sequence.chain.block_size
            self._waiting.append((self._estimator.access, sequence.chain.block_hashes[:full]))
        for event in update.events:
            if isinstance(event, BlockStored) and event.tier == POOL:
                self._waiting.append((self._estimator.keep, event.block_hashes))
        if len(self._waiting) > MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Take in what waits. From any thread, when no other thread waits for this one."""
        with self._lock:
            self._catch_up()

    def curve(self) -> list[CurvePoint]:
        """Empty before there is traffic."""
        with self._lock:
            self._catch_up()
            return self._estimator.curve()

    def figures(self) -> list[dict[str, Any]]:
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
