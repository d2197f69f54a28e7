"""The disk tier's side of the RAM cache's benchmark: the same values, stored, and read again and again."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from emberkv.core.hashing import TokenChain
from emberkv.tiers.byte_cache import MB
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.disk.files import scan
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier

NAMESPACE = bytes(range(32))
VALUES = 64
_QUOTA = 2 * VALUES * MB


def _records() -> list[BlockRecord]:
    """A chain of blocks of 1 MB."""
    chain = TokenChain(NAMESPACE, range(VALUES * 16), 16)
    return [
        BlockRecord(each, chain.parent(at), chain.block_tokens(at), at, True, os.urandom(MB))
        for at, each in enumerate(chain.block_hashes)
    ]


class Shelf:
    """1 MB blocks in a disk tier and in a RAM tier; every read is checked to have brought its block."""

    def __init__(self, folder: Path) -> None:
        self._blocks = folder / "blocks"
        self.disk = DiskTier.open(folder, _QUOTA, namespace=NAMESPACE)
        self.ram = MemoryTier(_QUOTA)
        records = _records()
        self._block_hashes = [record.block_hash for record in records]
        self._stacks = {}
        for tier in (self.ram, self.disk):
            stack = TierManager([tier], namespace=NAMESPACE, queue_bytes=_QUOTA)
            stack.offload([OffloadedBlock(record) for record in records])
            assert stack.flush(60)
            self._stacks[tier.name] = stack
        self._paths = {file.block_hash: self._blocks / file.path for file in scan(self._blocks)}
        for path in self._paths.values():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # only clean pages can be dropped from the page cache

    def loads(self, calls: int, *, cold: bool) -> list[float]:
        """Microseconds of each read of one block by the disk tier."""
        return self._timed(calls, lambda block_hash: self.disk.load([block_hash]), cold=cold)

    def fetches(self, tier: str, calls: int, *, cold: bool = False) -> list[float]:
        """Microseconds until a block comes up through a stack over that tier alone, verified."""
        stack = self._stacks[tier]

        def fetch(block_hash: bytes) -> list[BlockRecord | None]:
            outcome: Future[list[BlockRecord | None]] = Future()
            stack.onboard([block_hash], stack.find([block_hash]), outcome.set_result)
            return outcome.result()

        return self._timed(calls, fetch, cold=cold)

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close(10)

    def _timed(self, calls: int, read: Callable[[bytes], object], *, cold: bool) -> list[float]:
        taken = []
        for block_hash in islice(cycle(self._block_hashes), calls):
            if cold:
                self._drop(block_hash)
            begin = time.perf_counter()
            found = read(block_hash)
            taken.append(1e6 * (time.perf_counter() - begin))
            assert isinstance(found, list)
            assert found[0] is not None
        return taken

    def _drop(self, block_hash: bytes) -> None:
        """Takes the file out of the page cache. What lies beneath, such as a host's cache, may still have it."""
        descriptor = os.open(self._paths[block_hash], os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def shelf(parent: Path | None) -> Iterator[Shelf]:
    """In a folder of its own below ``parent`` (default: where temporary files go), removed afterwards."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        made = Shelf(Path(folder))
        try:
            yield made
        finally:
            made.close()
