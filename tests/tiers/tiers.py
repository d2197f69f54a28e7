"""Tiers that wait, take their time or break when a test wants them to."""

import threading
from collections.abc import Callable, Sequence

from emberkv.core.loading import LookupStatus
from emberkv.tiers.base import StoreResult, TierEntry
from emberkv.tiers.memory import MemoryTier
from tests.tiers.harness import Clock
from tests.waiting import DEADLINE

LARGE = 10_000_000


class GatedTier(MemoryTier):
    """What has been read is not handed out, and nothing is stored, while ``gate`` is closed.

    began: set when somebody comes to the gate. loads: each batch, in order.
    """

    def __init__(self, name: str = "gated") -> None:
        super().__init__(LARGE, name=name)
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.loads: list[tuple[bytes, ...]] = []
        self.closed = False

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        self.loads.append(tuple(block_hashes))
        found = super().load(block_hashes)
        self._pass()
        return found

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        self._pass()
        return super().store(entries, seen=seen)

    def close(self) -> None:
        self.closed = True

    def _pass(self) -> None:
        self.began.set()
        assert self.gate.wait(DEADLINE)


class BrokenTier(MemoryTier):
    """Raises what no tier should, from the methods in ``broken``."""

    def __init__(self, name: str = "broken") -> None:
        super().__init__(LARGE, name=name)
        self.broken: set[str] = set()

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        self._check("load")
        return super().load(block_hashes)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        self._check("store")
        return super().store(entries, seen=seen)

    def _check(self, method: str) -> None:
        if method in self.broken:
            raise ZeroDivisionError(method)


class SlowTier(MemoryTier):
    """A batch takes as long on ``clock`` as ``seconds`` says of its number of blocks."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float], name: str = "slow") -> None:
        super().__init__(LARGE, name=name)
        self._clock = clock
        self._seconds = seconds

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        self._clock.now += self._seconds(len(block_hashes))
        return super().load(block_hashes)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        self._clock.now += self._seconds(len(entries))
        return super().store(entries, seen=seen)


class RemoteTier(MemoryTier):
    """A tier without an index in memory: only `query` tells what it has, and answers while ``gate`` is open.

    An answer is what was true before it waited at the gate. began: set when a query has come to the gate.
    """

    lookup_seconds = 1.0
    keeps_partial = False

    def __init__(self, name: str = "remote") -> None:
        super().__init__(LARGE, name=name)
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.queries: list[int] = []
        self.broken = False

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        return 0

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        return LookupStatus.PENDING

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        self.queries.append(len(block_hashes))
        if self.broken:
            raise ConnectionError("the server is gone")
        found = super().lookup(block_hashes, exact=exact)
        self.began.set()
        assert self.gate.wait(DEADLINE)
        return found
