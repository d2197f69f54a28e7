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
from emberkv.errors import CacheFolderError, ConfigError, UntrustedPathError
from emberkv.tiers.base import PolicyFactory, RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.disk.files import MAX_OWNER_BYTES, BlockFile, BlockFiles, owner_folder
from emberkv.tiers.disk.index import Change, DiskIndex, JournalReader, JournalWriter
from emberkv.tiers.partial import PartialPlace
from emberkv.tiers.stats import ErrorCounts, TierStats
from emberkv.tiers.store_id import folder_id

logger = logging.getLogger(__name__)

MAX_NAMESPACE_BYTES = 64
REFRESH_SECONDS = 0.5

OTHER_WRITER = "another process writes here"
UNWRITABLE = "folder cannot be written"
UNREADABLE = "folder cannot be read"
GONE = "folder is gone"
CLOSED = "closed"

_CONSEQUENCES = {
    OTHER_WRITER: "its blocks are loaded, none are stored; this process takes over when that one ends",
    UNWRITABLE: "blocks are loaded but not stored",
    UNREADABLE: "blocks that are known are loaded, none are stored until it can be",
    GONE: "nothing is loaded or stored until it is back",
}


class DiskTier(Tier):
    """A `Tier` in a folder, made by `open`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     tier = DiskTier.open(Path(folder), max_bytes=2**20, namespace=b"dtypes, kernels")
    ...     tier.store([TierEntry(bytes(32), "tenant", b"an encoded block")]).count
    ...     tier.close()
    ...     again = DiskTier.open(Path(folder), max_bytes=2**20, namespace=b"dtypes, kernels")
    ...     again.lookup([bytes(32)])
    ...     again.close()
    1
    1

    Blocks of other models that the folder holds count towards the quota and are evicted in their turn, but never match.
    Of several processes on one folder one writes at a time. The others load, follow its journal at each `refresh`, and
    one of them writes once it has ended.
    """

    refresh_seconds = REFRESH_SECONDS
    keeps_partial = True

    def __init__(
        self,
        files: BlockFiles,
        max_bytes: int,
        *,
        namespace: bytes,
        policy: PolicyFactory,
        name: str,
        wall_ns: Callable[[], int],
    ) -> None:
        self.name = name
        self.read_only: str | None = ""
        """Why nothing is stored here; None where blocks are stored."""
        self._files = files
        self._policy = policy
        self._max_bytes = max_bytes
        self._index = DiskIndex(max_bytes, policy)
        self._namespace = namespace
        self._wall_ns = wall_ns
        self._lock = threading.Lock()  # the index, the counters and the lists below
        self._evictions = 0
        self._skipped: Counter[str] = Counter()
        self._errors = ErrorCounts(logger, f"{name} tier")
        self._unpublished: list[Change] = []
        self._unremoved: set[bytes] = set()  # keys of removals that could not be carried out
        self._following = threading.Lock()  # the journals and the writer's lock
        self._journal = JournalWriter(files.blocks)
        self._others = JournalReader(files.blocks)
        self._writer_lock: int | None = None
        self._scanned = False

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
        namespace of another size, CacheFolderError where the folder can be neither made nor read, or is not trusted.
        """
        if max_bytes <= 0:
            raise ConfigError(f"the disk cache's size is {max_bytes} bytes; it must be above 0")
        if not 0 < len(namespace) <= MAX_NAMESPACE_BYTES:
            raise ConfigError(f"a namespace of {len(namespace)} bytes; it must have 1 to {MAX_NAMESPACE_BYTES}")
        tier = cls(files(folder), max_bytes, namespace=namespace, policy=policy, name=name, wall_ns=wall_ns)
        with tier._following:
            if not tier._become_writer():
                tier._follow()
        tier.store_id = folder_id(folder, namespace)
        return tier

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        for position, block_hash in enumerate(block_hashes):
            file = self._index.find(self._namespace + block_hash)
            if file is None or (exact and not file.exact):
                return position
        return len(block_hashes)

    def block_hashes(self) -> list[bytes]:
        with self._lock:
            files = self._index.files()
        return [file.block_hash for file in files if file.namespace == self._namespace and file.partial is None]

    def partial_counts(self, parent: bytes) -> list[int]:
        return self._index.partial_of(self._namespace).counts(parent)

    def partial_place(self, block_hash: bytes) -> PartialPlace | None:
        return self._index.partial_of(self._namespace).place(block_hash)

    def partial_owner(self, block_hash: bytes) -> str | None:
        file = self._index.find(self._namespace + block_hash)
        return None if file is None else file.owner

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        entries: dict[bytes, TierEntry] = {}
        for file, stamp in self._used(block_hashes):
            data = self._read(file)
            if data is not None:
                entries[file.block_hash] = TierEntry(file.block_hash, file.owner, data, file.exact, file.partial)
                self._stamp(file, stamp)
        return [entries.get(block_hash) for block_hash in block_hashes]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        for file, stamp in self._used(block_hashes):
            self._stamp(file, stamp)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        gone: list[BlockFile] = []
        count = sum(self._store_one(entry, gone) for entry in reversed(entries))
        self._publish()
        ours = [file.block_hash for file in gone if file.namespace == self._namespace and file.partial is None]
        return StoreResult(count, [block_hash for block_hash in ours if not self.lookup([block_hash])])

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        """Where the files cannot be removed, because another process writes here, say, they are not found any more by
        this process, and are removed should it become the one that writes.
        """
        self._catch_up()
        with self._lock:
            with_them = self._index.partial_of(self._namespace).removed_with(block_hashes) if remember else []
        wanted = dict.fromkeys([*block_hashes, *with_them])
        return self._remove([self._namespace + block_hash for block_hash in wanted])

    def clear(self) -> RemovalResult:
        """As `remove`, of all blocks of this model."""
        self._catch_up()
        with self._lock:
            keys = [file.key for file in self._index.files() if file.namespace == self._namespace]
        return self._remove(keys)

    def refresh(self) -> None:
        """Take in what the writing process has changed; write in its place if it has ended; notice a folder that has
        gone or come back. Where nothing has changed, this costs one system call for the process that writes, and a
        few for the others, however many blocks there are.
        """
        with self._following:
            if self.read_only == CLOSED:
                return
            if self._writer_lock is not None:
                if self._files.holds(self._writer_lock):
                    return
                self._stop_writing()
            try:
                if not self._become_writer():
                    self._follow()
            except CacheFolderError as error:
                self._not_read(error)
            if self.read_only == CLOSED:  # `close` did not wait for this
                self._release()
        self._publish()

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                entries=len(self._index),
                bytes=self._index.bytes,
                max_bytes=self._index.max_bytes,
                bytes_by_owner={owner: size for owner, size in self._index.bytes_by_owner.items() if size},
                evictions=self._evictions,
                skipped=dict(self._skipped),
                errors=dict(self._errors.counts),
            )

    def close(self) -> None:
        """Let another process write here; nothing is stored from now on."""
        self.read_only = CLOSED
        if self._following.acquire(timeout=1.0):  # else a refresh waits for a disk that does not answer
            try:
                self._release()
            finally:
                self._following.release()

    def _release(self) -> None:
        self._stop_writing()
        self._others.close()

    def _stop_writing(self) -> None:
        self._journal.close()
        held, self._writer_lock = self._writer_lock, None
        if held is not None:
            os.close(held)

    def _become_writer(self) -> bool:
        try:
            held = self._files.lock()
            if held is None:
                self._set_state(OTHER_WRITER)
                return False
            left, index, gone = self._prepare(held)
        except OSError as error:
            self._set_state(UNWRITABLE if self._files.exists() else GONE, error)
            return False
        except CacheFolderError:
            self._set_state(UNREADABLE)
            raise
        self._writer_lock = held
        self._set_state(None)
        try:
            self._journal.begin()
        except (OSError, UntrustedPathError) as error:
            self._journal_failed(error)
        self._take_in(index, gone)
        logger.info("%s tier: this process writes to the folder, which has %d blocks", self.name, len(self._index))
        if left:
            logger.warning("%s tier: %d folders among the temporary files are left alone", self.name, left)
        return True

    def _prepare(self, held: int) -> tuple[int, DiskIndex, list[BlockFile]]:
        """What `BlockFiles.tidy` left, and what `_scan` found; where they fail, another process may have the lock."""
        try:
            return self._files.tidy(), *self._scan()
        except (OSError, CacheFolderError):
            os.close(held)
            raise

    def _set_state(self, read_only: str | None, error: OSError | None = None) -> None:
        if self.read_only in (read_only, CLOSED):
            return
        self.read_only = read_only
        if error is not None and read_only == UNWRITABLE:
            with self._lock:
                self._failed(UNWRITABLE, error)
        if read_only is not None:
            logger.warning("%s tier: %s; %s", self.name, read_only, _CONSEQUENCES[read_only])

    def _catch_up(self) -> None:
        """Know of all that the writing process has stored, so that a removal removes that too."""
        with self._following:
            if self.read_only in (None, CLOSED):
                return
            try:
                self._follow()
            except CacheFolderError as error:  # what is known of is removed all the same
                self._not_read(error)

    def _not_read(self, error: CacheFolderError) -> None:
        """The folder went during the scan, or cannot be read; the next refresh scans it again."""
        self._scanned = False
        with self._lock:
            self._failed("folder not read", OSError(str(error)))

    def _follow(self) -> None:
        """Take in what another process has journaled."""
        if self.read_only == GONE:
            self._scanned = False
            self._others.close()
            with self._lock:
                self._index = DiskIndex(self._max_bytes, self._policy)
            return
        try:
            changes = self._others.changes()
        except (OSError, UntrustedPathError):  # no process has kept a journal here yet
            changes = ()
        if changes is None or not self._scanned:
            self._take_in(*self._scan())
            return
        with self._lock:
            for file, stored in changes:
                if stored:
                    self._unremoved.discard(file.key)
                    self._index.note(file)
                elif (there := self._index.get(file.key)) and there.path == file.path:
                    self._unremoved.discard(file.key)
                    self._index.discard(file.key)

    def _scan(self) -> tuple[DiskIndex, list[BlockFile]]:
        """An index of what the folder has, and what the quota forbids. Raises CacheFolderError."""
        index = DiskIndex(self._max_bytes, self._policy)
        return index, index.fill(self._files.scan())

    def _take_in(self, index: DiskIndex, gone: Sequence[BlockFile]) -> None:
        """Go by what `_scan` found. The process that writes removes what the quota forbids and was to be removed."""
        self._scanned = True
        left = [file for key in self._unremoved if (file := index.get(key))]
        for file in left:
            index.set_aside(file)
        with self._lock:
            self._index = index
            self._unremoved = {file.key for file in left}
        self._unlink(gone)
        if left and not self.read_only:
            self._remove([file.key for file in left])

    def _publish(self) -> None:
        with self._lock:
            changes, self._unpublished = self._unpublished, []
        if not changes or self.read_only:
            return
        try:
            self._journal.append(changes)
        except (OSError, UntrustedPathError) as error:
            self._journal_failed(error)

    def _journal_failed(self, error: OSError | UntrustedPathError) -> None:
        """Other processes see the changes later: a new journal, which they scan the folder for, is begun next time."""
        with self._lock:
            self._failed("journal not written", error if isinstance(error, OSError) else OSError(str(error)))

    def _remove(self, keys: Sequence[bytes]) -> RemovalResult:
        with self._lock:
            found = [file for key in keys if (file := self._index.get(key))]
        count, kept, reason = 0, 0, ""
        for file in found:
            refusal = self.read_only or self._unlink_one(file)
            with self._lock:
                if refusal:
                    self._index.set_aside(file)
                    self._unremoved.add(file.key)
                else:
                    self._unremoved.discard(file.key)
                    self._index.discard(file.key)
            kept, reason = kept + bool(refusal), refusal or reason
            count += not refusal and file.partial is None
        self._publish()
        return RemovalResult(count, kept, reason)

    def _used(self, block_hashes: Sequence[bytes]) -> list[tuple[BlockFile, int]]:
        with self._lock:
            return self._index.used([self._namespace + block_hash for block_hash in block_hashes], self._wall_ns())

    def _store_one(self, entry: TierEntry, gone: list[BlockFile]) -> bool:
        """Whether it is here now; ``gone`` takes what had to go for it."""
        file = BlockFile(self._namespace, entry.block_hash, entry.owner, entry.exact, len(entry.data), 0, entry.partial)
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
            if written:
                self._unremoved.discard(file.key)
                self._unpublished.append(Change(file._replace(mtime_ns=stamp), stored=True))
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
            self._unlink_one(file)

    def _unlink_one(self, file: BlockFile) -> str:
        """Why the file could not be removed; "" where it was."""
        try:
            self._files.unlink(file.path)
        except OSError as error:
            with self._lock:
                self._failed("not removed", error)
            return f"not removed: {error.strerror}"
        with self._lock:
            self._unpublished.append(Change(file, stored=False))
        return ""

    def _vanished(self, file: BlockFile, error: OSError) -> None:
        with self._lock:
            if self._index.get(file.key) is file:  # else it was evicted or replaced since it was looked up
                self._index.discard(file.key)
                self._failed("vanished", error)

    def _failed(self, kind: str, error: OSError) -> None:
        """Count it; the caller holds the lock. Only the system's words are logged, as a path names owners."""
        self._errors.count(kind, error.strerror or type(error).__name__)
