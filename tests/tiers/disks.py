"""Disks that fail on demand, and looks at a cache folder from outside."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from emberkv.tiers.base import PolicyFactory, TierEntry
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.disk_files import BlockFiles
from emberkv.tiers.disk_layout import LOCK, TEMPORARY
from tests.tiers.build import NAMESPACE

LARGE = 1_000_000


class FailingFiles(BlockFiles):
    """Each call of the method ``fails`` raises ``error`` (a number of `errno`)."""

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


def failing(**settings: object) -> Callable[[Path], BlockFiles]:
    """Makes files that fail from the start on."""

    def make(folder: Path) -> BlockFiles:
        files = FailingFiles(folder)
        for name, value in settings.items():
            setattr(files, name, value)
        return files

    return make


def opened(
    folder: Path, max_bytes: int = LARGE, *, namespace: bytes = NAMESPACE, policy: PolicyFactory | None = None
) -> DiskTier:
    more = {"policy": policy} if policy else {}
    return DiskTier.open(folder, max_bytes, namespace=namespace, **more)


def files_of(folder: Path) -> list[Path]:
    """All block files, whoever's they are."""
    return sorted(path for path in folder.rglob("*.kv") if path.is_file())


def others_of(folder: Path) -> list[str]:
    """All other files, without the lock's."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".kv" and path.name != LOCK]


def leave_temporary(folder: Path, name: str, data: bytes) -> None:
    (folder / "blocks" / TEMPORARY / name).write_bytes(data)


def stored(folder: Path, entries: list[TierEntry], *, namespace: bytes = NAMESPACE) -> None:
    """Store, and let go of the folder."""
    tier = opened(folder, namespace=namespace)
    for entry in entries:
        assert tier.store([entry]).count == 1
    tier.close()
