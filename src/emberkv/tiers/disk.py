"""The disk tier: one file a block, found again by the next process, within a quota of bytes.

No lock is held while a file is read, written or removed. A failure of the disk costs a block, is counted and logged,
and never raised: a file that has vanished is a miss, one that cannot be read is passed over until it is stored again,
one that cannot be written is skipped.
"""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from emberkv.core.policies.eviction import LRU
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Stored, TierEntry
from emberkv.tiers.disk_files import BlockFiles
from emberkv.tiers.disk_index import DiskIndex
from emberkv.tiers.disk_layout import MAX_OWNER_BYTES, BlockFile, owner_folder, scan
from emberkv.tiers.stats import TierStats, Troubles

logger = logging.getLogger(__name__)

MAX_NAMESPACE_BYTES = 64


class DiskTier:
    """A `Tier` in a folder, made by `open`.

    Blocks of other models that the folder holds count towards the quota and are evicted in their turn, but never match.
    Of several processes on one folder the first writes, until it ends; the others load, and skip what they should
    store.
    """

    def __init__(
        self, files: BlockFiles, index: DiskIndex, *, namespace: bytes, name: str, wall_ns: Callable[[], int]
    ) -> None:
        self.name = name
        self.read_only: str | None = None
        """Why nothing is stored here; None where it is."""
        self._files = files
        self._index = index
        self._namespace = namespace
        self._wall_ns = wall_ns
        self._lock = threading.Lock()  # the index and all counters
        self._evictions = 0
        self._skipped: Counter[str] = Counter()
        self._troubles = Troubles(logger, f"{name} tier")
        self._writer_lock: int | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        max_bytes: int,
        *,
        namespace: bytes,
        policy: PolicyFactory = LRU,
        name: str = "disk",
        files: Callable[[Path], BlockFiles] = BlockFiles,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> "DiskTier":
        """Find what an earlier process left in ``folder``, and make room where it exceeds ``max_bytes``.

        namespace: of the model, 1 to 64 bytes. policy: the order of eviction; it meets the files in the order in which
        they were last of use. wall_ns: a clock for the files' times. Raises ConfigError for a quota not above 0 or a
        namespace of another size, CacheFolderError where the folder can be neither made nor read.
        """
        if max_bytes <= 0:
            raise ConfigError(f"the disk cache's size is {max_bytes} bytes; it must be above 0")
        if not 0 < len(namespace) <= MAX_NAMESPACE_BYTES:
            raise ConfigError(f"a namespace of {len(namespace)} bytes; it must have 1 to {MAX_NAMESPACE_BYTES}")
        index = DiskIndex(max_bytes, policy)
        tier = cls(files(folder), index, namespace=namespace, name=name, wall_ns=wall_ns)
        tier._become_writer()
        tier._unlink(index.fill(scan(tier._files.blocks)))
        return tier

    def lookup(self, identities: Sequence[bytes], *, exact: bool = False) -> int:
        for position, identity in enumerate(identities):
            file = self._index.find(self._namespace + identity)
            if file is None or (exact and not file.exact):
                return position
        return len(identities)

    def load(self, identities: Sequence[bytes]) -> list[TierEntry | None]:
        entries: dict[bytes, TierEntry] = {}
        for file, stamp in self._used(identities):
            data = self._read(file)
            if data is not None:
                entries[file.identity] = TierEntry(file.identity, file.owner, data, file.exact)
                self._stamp(file, stamp)
        return [entries.get(identity) for identity in identities]

    def touch(self, identities: Sequence[bytes]) -> None:
        for file, stamp in self._used(identities):
            self._stamp(file, stamp)

    def store(self, entries: Sequence[TierEntry]) -> Stored:
        gone: list[BlockFile] = []
        count = sum(self._store_one(entry, gone) for entry in reversed(entries))
        ours = [file.identity for file in gone if file.namespace == self._namespace]
        return Stored(count, [identity for identity in ours if not self.lookup([identity])])

    def remove(self, identities: Sequence[bytes]) -> int:
        with self._lock:
            gone = [file for identity in identities for file in self._index.discard(self._namespace + identity)]
        self._unlink(gone)
        return len(gone)

    def clear(self) -> int:
        with self._lock:
            ours = [file.identity for file in self._index.files() if file.namespace == self._namespace]
        return self.remove(ours)

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._index),
                bytes=self._index.bytes,
                max_bytes=self._index.max_bytes,
                bytes_by_owner={owner: size for owner, size in self._index.bytes_by_owner.items() if size},
                evictions=self._evictions,
                skipped=dict(self._skipped),
                troubles=dict(self._troubles.counts),
            )

    def close(self) -> None:
        """Let another process write here; nothing is stored from now on."""
        with self._lock:
            self.read_only = self.read_only or "closed"
            held, self._writer_lock = self._writer_lock, None
        if held is not None:
            os.close(held)

    def _become_writer(self) -> None:
        try:
            self._writer_lock = self._files.lock()
            if self._writer_lock is None:
                self.read_only = "another process writes here"
            else:
                self._files.tidy()
        except OSError as error:
            self.read_only = "folder cannot be written"
            self._failed(self.read_only, error)
        if self.read_only:
            logger.warning("%s tier: %s; blocks are loaded but not stored", self.name, self.read_only)

    def _used(self, identities: Sequence[bytes]) -> list[tuple[BlockFile, int]]:
        with self._lock:
            return self._index.used([self._namespace + identity for identity in identities], self._wall_ns())

    def _store_one(self, entry: TierEntry, gone: list[BlockFile]) -> bool:
        """Whether it is here now; ``gone`` takes what had to go for it."""
        file = BlockFile(self._namespace, entry.identity, entry.owner, entry.exact, len(entry.data), 0)
        with self._lock:
            there = self._index.find(file.key)
            if there and (there.exact or not entry.exact):
                return True
        stamp = self._make_room(file, gone)
        if stamp is None:
            return False
        written = self._write(file, entry.data, stamp)
        with self._lock:
            self._index.unreserve(file.size)
            replaced = self._index.discard(file.key) if written else []
            surplus = self._index.add(file) if written else []
            self._evictions += len(surplus)
            kept = written and self._index.find(file.key) is not None
        gone += surplus
        self._unlink([*(each for each in replaced if each.path != file.path), *surplus])
        return kept

    def _make_room(self, file: BlockFile, gone: list[BlockFile]) -> int | None:
        """Reserve what it takes; the time to write on it, or None, counted, where it may not be stored."""
        with self._lock:
            refusal = self._refusal(file)
            has_room, evicted = (False, []) if refusal else self._index.reserve(file.size, file.owner)
            if not has_room:
                self._skipped[refusal or "no room"] += 1
            self._evictions += len(evicted)
            stamp = self._index.stamp(self._wall_ns())
        gone += evicted
        self._unlink(evicted)
        return stamp if has_room else None

    def _refusal(self, file: BlockFile) -> str | None:
        if self.read_only:
            return self.read_only
        if file.size > self._index.max_bytes:
            return "too large"
        return "owner's name too long" if len(owner_folder(file.owner)) > MAX_OWNER_BYTES else None

    def _read(self, file: BlockFile) -> bytes | None:
        try:
            return self._files.read(file.path)
        except FileNotFoundError as error:
            self._vanished(file, error)
        except OSError as error:
            with self._lock:
                self._index.set_aside(file)
                self._failed("unreadable", error)
        return None

    def _write(self, file: BlockFile, data: bytes, stamp_ns: int) -> bool:
        try:
            self._files.write(file.path, data, stamp_ns)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            with self._lock:
                self._skipped["disk full" if full else "write failed"] += 1
                self._failed("disk full" if full else "write failed", error)
            return False
        return True

    def _stamp(self, file: BlockFile, stamp_ns: int) -> None:
        if self.read_only:
            return
        try:
            self._files.stamp(file.path, stamp_ns)
        except FileNotFoundError as error:
            self._vanished(file, error)
        except OSError as error:
            with self._lock:
                self._failed("time not written", error)

    def _unlink(self, files: Iterable[BlockFile]) -> None:
        for file in () if self.read_only else files:
            try:
                self._files.unlink(file.path)
            except OSError as error:
                with self._lock:
                    self._failed("not removed", error)

    def _vanished(self, file: BlockFile, error: OSError) -> None:
        with self._lock:
            if self._index.get(file.key) is file:  # else it was evicted or replaced since it was looked up
                self._index.discard(file.key)
                self._failed("vanished", error)

    def _failed(self, kind: str, error: OSError) -> None:
        """Count it; the caller holds the lock. Only the system's words are logged, as a path names owners."""
        self._troubles.count(kind, error.strerror or type(error).__name__)
