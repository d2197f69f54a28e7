"""Fetches: blocks on their way up, read in pieces by several threads, with the pieces of all fetches taking turns.

So a long fetch does not make a short one wait for its end, and one fetch uses all the threads when it is alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from emberkv.tiers.codec import BlockRecord

logger = logging.getLogger(__name__)

CHUNK_BLOCKS = 8
"""Blocks of a piece: many enough for turns to cost nothing, few enough for all threads to have work."""

Records = list[BlockRecord | None]


@dataclass(frozen=True, slots=True)
class Timing:
    """What reading a piece took, and what came of it: sound blocks, and the bytes of their records."""

    rank: int
    began: float
    ended: float
    blocks: int
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks ``[start, stop)`` of a fetch, all from one tier. rank: of the tier, 0 the fastest."""

    rank: int
    start: int
    stop: int


class Fetch:
    """Blocks asked for together, and the records that came. Its `Loaders` hold their lock around all but `cancel`.

    What comes after a block that is missing is of no use, so it is not read any more once that is known.
    """

    def __init__(self, identities: Sequence[bytes], pieces: Sequence[Piece], done: Callable[[Records], None]) -> None:
        self.identities = identities
        self.records: Records = [None] * len(identities)
        self.timings: list[Timing] = []
        self.done = done
        self._pieces = deque(pieces)
        self._usable = len(identities)
        self._in_hand = 0
        self._cancelled = False

    def cancel(self) -> None:
        """Read no more than what is being read now; ``done`` is told what has come by then."""
        self._cancelled = True

    def begin(self) -> Piece | None:
        """The next piece to read, to be followed by `end`; None where there is no more."""
        if not self._pieces or self._cancelled or self._pieces[0].start >= self._usable:
            self._pieces.clear()
            return None
        self._in_hand += 1
        return self._pieces.popleft()

    def end(self, piece: Piece, records: Records) -> None:
        """What came of a piece; fewer records than it has blocks where reading failed."""
        self._in_hand -= 1
        self.records[piece.start : piece.start + len(records)] = records
        sound = records.index(None) if None in records else len(records)
        if piece.start + sound < piece.stop:
            self._usable = min(self._usable, piece.start + sound)

    @property
    def finished(self) -> bool:
        return not self._pieces and not self._in_hand


class Loaders:
    """Threads that read fetches.

    read: the records of a piece. finish: told of each fetch, once. failed: told of what either raised.
    """

    def __init__(
        self,
        threads: int,
        *,
        read: Callable[[Fetch, Piece], Records],
        finish: Callable[[Fetch], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._threads = threads
        self._read = read
        self._finish = finish
        self._failed = failed
        self._changed = threading.Condition()
        self._turns: deque[Fetch] = deque()
        self._open: set[Fetch] = set()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="emberkv-tier-loader")

    def start(self, fetch: Fetch) -> None:
        """It will be finished on one of the threads; after `close` here and at once, with nothing read."""
        with self._changed:
            closed = self._closed
            if not closed:
                self._open.add(fetch)
                self._turns.append(fetch)
                for _ in range(self._threads):
                    self._pool.submit(self._work)
        if closed:
            self._try_finish(fetch)

    def close(self, timeout: float) -> None:
        """Cancel what is open, and finish those too whose reading does not end within ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            for fetch in self._open:
                fetch.cancel()
            ended = self._changed.wait_for(lambda: not self._open, timeout)
            stuck, self._open = self._open, set()
        for fetch in stuck:
            self._try_finish(fetch)
        self._pool.shutdown(wait=ended)

    def _work(self) -> None:
        """Read piece after piece, of another fetch each time, until none is left to begin."""
        while True:
            with self._changed:
                if not self._turns:
                    return
                fetch = self._turns.popleft()
                piece = fetch.begin()
                if piece:
                    self._turns.append(fetch)
            if piece:
                records = self._try_read(fetch, piece)
                with self._changed:
                    fetch.end(piece, records)
            self._close_if_finished(fetch)

    def _try_read(self, fetch: Fetch, piece: Piece) -> Records:
        try:
            return self._read(fetch, piece)
        except Exception as error:
            logger.exception("blocks could not be read; they are computed instead")
            self._failed(error)
            return []

    def _close_if_finished(self, fetch: Fetch) -> None:
        with self._changed:
            last = fetch.finished and fetch in self._open
            if last:
                self._open.discard(fetch)
        if last:
            self._try_finish(fetch)
            with self._changed:
                self._changed.notify_all()

    def _try_finish(self, fetch: Fetch) -> None:
        try:
            self._finish(fetch)
        except Exception as error:
            logger.exception("whoever asked for blocks failed to take them")
            self._failed(error)
