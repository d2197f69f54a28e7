"""Disks that fail on demand, and looks at a cache folder from outside."""

import errno
import os
from pathlib import Path

from emberkv.core.hashing import BlockHash
from emberkv.core.policies.eviction import LRU
from emberkv.tiers.base import PolicyFactory, TierEntry
from emberkv.tiers.disk.files import JOURNAL, LOCK, TEMPORARY, BlockFiles
from emberkv.tiers.disk.tier import DiskTier
from tests.tiers.build import NAMESPACE

LARGE = 1_000_000


class FailingFiles(BlockFiles):
    """From when ``fails`` names a method, its calls raise ``error`` (a number of `errno`)."""

    fails = ""
    error = errno.EIO

    def _check(self, method: str) -> None:
        if self.fails == method:
            raise OSError(self.error, os.strerror(self.error))

    def lock(self) -> int | None:
        self._check("lock")
        return super().lock()

    def read(self, path: str) -> bytes:
        self._check("read")
        return super().read(path)

    def stamp(self, path: str, stamp_ns: int) -> None:
        self._check("stamp")
        super().stamp(path, stamp_ns)

    def unlink(self, path: str) -> None:
        self._check("unlink")
        super().unlink(path)

    def put_bytes(self, descriptor: int, data: memoryview) -> int:
        """Half of the bytes get through before it fails, as on a disk that fills up."""
        written = super().put_bytes(descriptor, data[: max(len(data) // 2, 1)])
        self._check("write")
        return written


def opened(
    folder: Path,
    max_bytes: int = LARGE,
    *,
    namespace: bytes = NAMESPACE,
    policy: PolicyFactory = LRU,
    files: BlockFiles | None = None,
) -> DiskTier:
    return DiskTier.open(
        folder, max_bytes, namespace=namespace, policy=policy, files=BlockFiles if files is None else lambda _: files
    )


def files_of(folder: Path) -> list[Path]:
    """The block files of all owners."""
    return sorted(path for path in folder.rglob("*.kv") if path.is_file())


def path_of(folder: Path, block_hash: BlockHash) -> Path:
    return next(path for path in files_of(folder) if path.name.startswith(block_hash.hex()))


def others_of(folder: Path) -> list[str]:
    """All other files, without the lock and the journal."""
    known = (LOCK, JOURNAL)
    return [
        path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".kv" and path.name not in known
    ]


def leave_temporary(folder: Path, name: str, data: bytes) -> None:
    (folder / "blocks" / TEMPORARY / name).write_bytes(data)


def stored(folder: Path, entries: list[TierEntry], *, namespace: bytes = NAMESPACE) -> None:
    """Store, and let go of the folder."""
    tier = opened(folder, namespace=namespace)
    for entry in entries:
        assert tier.store([entry]).count == 1
    tier.close()
