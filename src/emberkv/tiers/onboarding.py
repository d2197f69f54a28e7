"""What a request asks of the tiers' workers: to look blocks up, and to read a run of them in pieces."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from emberkv.core.loading import BlockRun
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.partial import PartialPlace

PIECE_BLOCKS = 8
"""Many enough for turns to cost little, few enough for all threads of a worker to have work."""

Records = list[BlockRecord | None]


@dataclass(frozen=True, slots=True)
class Timing:
    """How long reading a piece took, in seconds, and what came of it: sound blocks, and the bytes of their records."""

    rank: int
    began: float
    ended: float
    blocks: int
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks ``[start, stop)`` of an onboarding, all from one tier. rank: of the tier, 0 the fastest."""

    rank: int
    start: int
    stop: int


class Query:
    """A look-up that tiers answer after I/O. The manager's lock is held around all methods.

    seconds: how long its caller waits, at most. done: called once, when all tiers have answered or will not any more.
    """

    def __init__(
        self,
        block_hashes: Sequence[bytes],
        ranks: Collection[int],
        seconds: float,
        done: Callable[[], None],
        exact: bool,
    ) -> None:
        self.block_hashes = block_hashes
        self.exact = exact
        self.seconds = seconds
        self.done = done
        self.ranks = set(ranks)
        """Of the tiers that have not answered."""
        self._removed: set[int] = set()
        self._stored: set[bytes] = set()

    @property
    def finished(self) -> bool:
        return not self.ranks

    def deliver(self) -> None:
        self.done()

    def cancel(self) -> None:
        """Wait for no answer."""
        self.ranks.clear()

    def remove(self, block_hashes: Collection[bytes] | None) -> None:
        """These blocks, all for None, were removed: an answer that is still to come says nothing of them."""
        for at, block_hash in enumerate(self.block_hashes):
            if block_hashes is None or block_hash in block_hashes:
                self._removed.add(at)

    def stored(self, block_hashes: Collection[bytes]) -> None:
        """These blocks were stored: an answer that is still to come does not say that they are missing."""
        self._stored.update(block_hashes)

    def answers(self, count: int) -> list[tuple[bytes, bool]]:
        """What a tier's answer says of the blocks: ``count`` are there, the next is not, of others it says nothing."""
        said = [(block_hash, at < count) for at, block_hash in enumerate(self.block_hashes[: count + 1])]
        return [
            (block_hash, there)
            for at, (block_hash, there) in enumerate(said)
            if at not in self._removed and (there or block_hash not in self._stored)
        ]


class Onboarding:
    """A request to read blocks, and the records read so far. The manager's lock is held around all methods.

    Blocks behind one that is missing are of no use, so they are not read once that is known.

    partial: where the last block lies, if that is a partial one.
    """

    def __init__(
        self,
        block_hashes: Sequence[bytes],
        runs: Sequence[BlockRun],
        ranks: dict[str, int],
        done: Callable[[Records], None],
        removals_seen: Sequence[int],
        *,
        partial: PartialPlace | None = None,
    ) -> None:
        self.block_hashes = block_hashes
        self._partial = partial
        self.removals_seen = removals_seen
        """By the tier's rank, what `Tier.removals_seen` was before anything was read."""
        self.records: Records = [None] * len(block_hashes)
        self.timings: list[Timing] = []
        self.done = done
        self.reading: list[Piece] = []
        self._pieces: dict[int, deque[Piece]] = {}
        self._usable = len(block_hashes)
        self._removed: set[int] = set()
        self._sources: list[int] = []  # of each block, the rank of the tier that it is to come from
        first = 0
        for run in runs:
            stop = min(first + run.count, len(block_hashes))
            rank = ranks[run.tier]
            pieces = (Piece(rank, at, min(at + PIECE_BLOCKS, stop)) for at in range(first, stop, PIECE_BLOCKS))
            self._pieces.setdefault(rank, deque()).extend(pieces)
            self._sources += [rank] * (stop - first)
            first = stop

    @property
    def ranks(self) -> list[int]:
        """Of the tiers that are still to be read from."""
        return [rank for rank, pieces in self._pieces.items() if pieces and pieces[0].start < self._usable]

    @property
    def finished(self) -> bool:
        return not self.reading and not self.ranks

    def deliver(self) -> None:
        self.done(list(self.records))

    @property
    def places(self) -> dict[bytes, PartialPlace]:
        """Where the partial block lies, by its hash; empty where there is none."""
        return {} if self._partial is None else {self.block_hashes[-1]: self._partial}

    def cancel(self) -> None:
        """Read no more than what is being read now."""
        self._pieces.clear()

    def remove(self, block_hashes: Collection[bytes] | None, *, rank: int | None = None) -> None:
        """These blocks, all for None, were removed from the tier of ``rank``, from every tier for None: their records
        are dropped, those not yet read included.
        """
        last = len(self.block_hashes) - 1
        for at, block_hash in enumerate(self.block_hashes):
            named = block_hashes is None or block_hash in block_hashes
            if not named and at == last and self._partial is not None:
                named = block_hashes is None or self._partial.is_removed_with(block_hashes)
            if named and (rank is None or (at < len(self._sources) and self._sources[at] == rank)):
                self._removed.add(at)
                self.records[at] = None
                self._usable = min(self._usable, at)

    def begin(self, rank: int) -> Piece | None:
        """The next piece to read from a tier, to be followed by `end`; None where there is none."""
        pieces = self._pieces.get(rank)
        if not pieces or pieces[0].start >= self._usable:
            self._pieces.pop(rank, None)
            return None
        piece = pieces.popleft()
        self.reading.append(piece)
        return piece

    def end(self, piece: Piece, records: Records) -> Records:
        """Take in the records of a piece, fewer than it has blocks where reading failed; those that are kept."""
        self.reading.remove(piece)
        kept = [None if piece.start + at in self._removed else record for at, record in enumerate(records)]
        self.records[piece.start : piece.start + len(kept)] = kept
        sound = kept.index(None) if None in kept else len(kept)
        if piece.start + sound < piece.stop:
            self._usable = min(self._usable, piece.start + sound)
        return kept

    def rest_of(self, piece: Piece, start: int) -> list[bytes]:
        """The hashes from block ``start`` of a piece to the end of what is still to be read from its tier."""
        pieces = [piece, *self._pieces.get(piece.rank, ())]
        return [each for part in pieces for each in self.block_hashes[max(part.start, start) : part.stop]]
