"""A file in shared memory with slots of one size, which processes read without a lock and write under one.

    header | ring of changed slots | ring of removals | table of slots | data of the slots

A slot's sequence number is odd while it is written, so a reader notices a slot that changed meanwhile; the record's own
checksum is checked above. The kernel gives a dead process's locks back. The slot that it was writing is noted in the
header, and emptied by the next process that writes. Numbers are in the machine's byte order: only it reads them.
"""

import fcntl
import mmap
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from emberkv.errors import ConfigError, UntrustedPathError
from emberkv.files import open_own_file
from emberkv.tiers.partial import PartialPlace

MAGIC = b"EMBERSHM"
VERSION = 2
MAX_OWNER_BYTES = 128
REMEMBERED = 1024
"""Removals, and as many changed slots times four, that a process may be behind."""

_CHANGES_KEPT = 4 * REMEMBERED
_ALIGNMENT = 64
_PAGE = 4096

_HEADER = struct.Struct("=8sQQQ32s")
"""Magic, version, bytes of a slot, number of slots, digest of the namespace."""

_WRITING, _CHANGES, _REMOVALS = 16, 17, 18
"""Words of the header: the slot being written plus 1, or 0; the count of changed slots; the count of removals."""

_SLOT = struct.Struct("=IBBxx32s128sI32s32s")
"""Size, state, bytes of the owner's name, block hash, owner, and a `PartialPlace`'s count, 0 for a full block, its
parent and what is before it; in the table behind the sequence number and last use.
"""

_SLOT_WORDS = 32
_EMPTY, _INEXACT, _EXACT = 0, 1, 2
_SEQUENCE, _USED = 0, 1

_LOCK = struct.Struct("hhqqi4x")
"""The system's ``struct flock``: type, whence, start, length, process."""

_USERS, _WRITER = 0, 1
"""Bytes of the file that locks are on: each process that has it open shares the first, and has the second to write."""

ALL = bytes(32)
"""Stands for all blocks in the ring of removals."""

_NOWHERE = PartialPlace(b"", b"", 0)
"""In the slot of a full block."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds. used: when it was last used, in nanoseconds of the monotonic clock. partial: where the block
    lies, if it is a partial one.
    """

    block_hash: bytes
    owner: str
    size: int
    exact: bool
    used: int
    partial: PartialPlace | None = None


class Arena:
    """An open arena, made by `attach` or `create`. The caller keeps its threads apart where it writes.

    slot_bytes: the most that a record may have. slots: how many there are.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        magic, version, self.slot_bytes, self.slots, self.digest = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
        self._table_at, self._data_at, size = _layout(self.slot_bytes, self.slots)
        if (magic, version) != (MAGIC, VERSION) or os.fstat(descriptor).st_size != size:
            raise UntrustedPathError(f"{path} is no arena of this version of emberkv; remove it")
        self._bytes = memoryview(mmap.mmap(descriptor, size))
        self._words = self._bytes[:_PAGE].cast("Q")
        self._changed = self._bytes[_PAGE : _PAGE + 4 * _CHANGES_KEPT].cast("I")
        self._removed = self._bytes[_PAGE + 4 * _CHANGES_KEPT : self._table_at]
        self._table = self._bytes[self._table_at : self._table_at + 8 * _SLOT_WORDS * self.slots].cast("Q")

    @classmethod
    def attach(cls, path: Path, digest: bytes) -> "Arena | None":
        """The arena that another process has made; None where there is none.

        Raises UntrustedPathError for a file of another user or another kind, and OSError.
        """
        for _ in range(100):
            try:
                descriptor = open_own_file(path, os.O_RDWR)
            except FileNotFoundError:
                return None
            with _closing_on_error(descriptor):
                _check_private(path, descriptor)
                if _lock(descriptor, fcntl.F_RDLCK, _USERS) and _is_at(path, descriptor):
                    arena = cls(path, descriptor)
                    if arena.digest != digest:
                        raise UntrustedPathError(f"{path} is the arena of another namespace; remove it")
                    return arena
            os.close(descriptor)  # its last user is about to remove it
            time.sleep(0.001)
        return None

    @classmethod
    def create(cls, path: Path, digest: bytes, record_bytes: int, capacity: int) -> "Arena | None":
        """A new arena, or the one that another process has made first. Its name appears when it is whole.

        record_bytes: of the first record. capacity: bytes of all slots together. None where not even one slot fits, or
        an arena appears and goes again. Raises as `attach` does; memory for the slots is taken as they are filled.
        """
        slot_bytes = max(_ALIGNMENT, -(-record_bytes // _ALIGNMENT) * _ALIGNMENT)
        slots = capacity // slot_bytes
        if not slots:
            return None
        _, data_at, size = _layout(slot_bytes, slots)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = open_own_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with _closing_on_error(descriptor):
                _lock(descriptor, fcntl.F_RDLCK, _USERS)
                os.ftruncate(descriptor, size)
                os.posix_fallocate(descriptor, 0, data_at)
                os.pwrite(descriptor, _HEADER.pack(MAGIC, VERSION, slot_bytes, slots, digest), 0)
                os.link(temporary, path)
                return cls(path, descriptor)
        except FileExistsError:
            return cls.attach(path, digest)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def changes(self) -> int:
        return self._words[_CHANGES]

    @property
    def removals(self) -> int:
        return self._words[_REMOVALS]

    def changed_slots(self, since: int) -> tuple[Iterable[int], int]:
        """The slots that have changed since `changes` was ``since``, all if that is too long ago; and `changes` now."""
        until = self.changes
        found = [self._changed[number % _CHANGES_KEPT] for number in range(since, min(until, since + _CHANGES_KEPT))]
        if self.changes - since >= _CHANGES_KEPT:
            return range(self.slots), until
        return dict.fromkeys(found), until

    def removed_since(self, seen: int) -> Callable[[bytes], bool]:
        """Whether a block was removed after `removals` was ``seen``; the caller holds the lock."""
        last = self.removals
        if last - seen > REMEMBERED:
            return lambda _: True
        numbers = [number % REMEMBERED for number in range(seen, last)]
        removed = {bytes(self._removed[32 * number : 32 * number + 32]) for number in numbers}
        return lambda block_hash: ALL in removed or block_hash in removed

    def slot(self, number: int) -> Slot | None:
        """None where it is empty, or being written."""
        return self._read(number)[0]

    def read(self, number: int, block_hash: bytes) -> tuple[Slot, bytes] | None:
        """A slot with its record; None where it has another block, or changed meanwhile."""
        slot, data = self._read(number, block_hash)
        return None if slot is None else (slot, data)

    def used(self, number: int) -> int:
        return self._table[number * _SLOT_WORDS + _USED]

    def use(self, number: int, stamp: int) -> None:
        """It was used at ``stamp``, see `Slot`. Needs no lock."""
        self._table[number * _SLOT_WORDS + _USED] = stamp

    @contextmanager
    def writing(self, seconds: float) -> Iterator[bool]:
        """Hold the lock to write; False where another process has not given it back for so long."""
        deadline = time.monotonic() + seconds
        while not (held := _lock(self._descriptor, fcntl.F_WRLCK, _WRITER)) and time.monotonic() < deadline:
            time.sleep(0.001)
        try:
            if held and self._words[_WRITING]:  # a process has died in the middle of a write
                self.erase(self._words[_WRITING] - 1)
            yield held
        finally:
            if held:
                _lock(self._descriptor, fcntl.F_UNLCK, _WRITER)

    def write(self, number: int, slot: Slot, data: bytes) -> None:
        """Raises OSError where there is no memory for it; the slot is as before then."""
        owner = slot.owner.encode()
        at = self._data_at + number * self.slot_bytes
        os.posix_fallocate(self._descriptor, at, self.slot_bytes)
        state = _EXACT if slot.exact else _INEXACT
        where = slot.partial or _NOWHERE
        place = where.count, where.parent, where.previous
        meta = _SLOT.pack(len(data), state, len(owner), slot.block_hash, owner, *place)
        self._change(number, meta, slot.used, data)

    def erase(self, number: int) -> None:
        self._change(number, _SLOT.pack(0, _EMPTY, 0, b"", b"", 0, b"", b""), 0, b"")

    def note_removals(self, block_hashes: Iterable[bytes]) -> None:
        """Stores of these that other processes are about to make are refused."""
        for block_hash in block_hashes:
            number = self.removals
            self._removed[32 * (number % REMEMBERED) : 32 * (number % REMEMBERED) + 32] = block_hash
            self._words[_REMOVALS] = number + 1

    def close(self) -> None:
        """Write no more; the last process to close it removes it. Memory is given back when no process reads it."""
        if _lock(self._descriptor, fcntl.F_WRLCK, _USERS) and _is_at(self.path, self._descriptor):
            self.path.unlink()
        os.close(self._descriptor)

    def _read(self, number: int, block_hash: bytes | None = None) -> tuple[Slot | None, bytes]:
        word = number * _SLOT_WORDS
        sequence = self._table[word + _SEQUENCE]
        at = self._table_at + 8 * (word + 2)
        size, state, owner_bytes, found, owner, *place = _SLOT.unpack(self._bytes[at : at + _SLOT.size])
        if (
            sequence % 2
            or state == _EMPTY
            or size > self.slot_bytes
            or (block_hash is not None and found != block_hash)
        ):
            return None, b""
        data = b""
        if block_hash is not None:
            start = self._data_at + number * self.slot_bytes
            data = bytes(self._bytes[start : start + size])
        used = self._table[word + _USED]
        if self._table[word + _SEQUENCE] != sequence:
            return None, b""
        count, parent, previous = place
        partial = PartialPlace(parent, previous, count) if count else None
        return Slot(found, owner[:owner_bytes].decode(errors="replace"), size, state == _EXACT, used, partial), data

    def _change(self, number: int, meta: bytes, used: int, data: bytes) -> None:
        word = number * _SLOT_WORDS
        at, start = self._table_at + 8 * (word + 2), self._data_at + number * self.slot_bytes
        self._begin_change(number)
        self._bytes[at : at + _SLOT.size] = meta
        self._bytes[start : start + len(data)] = data
        self._table[word + _USED] = used
        self._end_change(number)

    def _begin_change(self, number: int) -> None:
        self._words[_WRITING] = number + 1
        self._table[number * _SLOT_WORDS + _SEQUENCE] |= 1

    def _end_change(self, number: int) -> None:
        self._table[number * _SLOT_WORDS + _SEQUENCE] += 1
        changes = self.changes
        self._changed[changes % _CHANGES_KEPT] = number
        self._words[_CHANGES] = changes + 1
        self._words[_WRITING] = 0


def remove_unused(folder: Path, pattern: str, keep: Path) -> None:
    """Remove the files of the pattern, other than ``keep``, that no process has open: those of processes that died."""
    for path in folder.glob(pattern):
        with suppress(OSError, UntrustedPathError):
            if path == keep:
                continue
            descriptor = open_own_file(path, os.O_RDWR)
            try:
                _check_private(path, descriptor)
                if _lock(descriptor, fcntl.F_WRLCK, _USERS) and _is_at(path, descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def check_room(folder: Path, capacity: int, option: str) -> None:
    """Raises ConfigError where the memory file system has less room than ``capacity``."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"{option} needs {folder}, which cannot be used: {error.strerror}") from error
    room = found.f_bavail * found.f_frsize
    if capacity > room:
        raise ConfigError(f"{option} is {capacity:,} bytes; {folder} has {room:,} left, so give less, or enlarge it")


def _layout(slot_bytes: int, slots: int) -> tuple[int, int, int]:
    """Where the table and the data begin, and the file's size."""
    table_at = _PAGE + 4 * _CHANGES_KEPT + 32 * REMEMBERED
    data_at = -(-(table_at + 8 * _SLOT_WORDS * slots) // _PAGE) * _PAGE
    return table_at, data_at, data_at + slots * slot_bytes


def _check_private(path: Path, descriptor: int) -> None:
    """`open_own_file` has checked what kind of file it is."""
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o600:
        raise UntrustedPathError(f"{path} is not a file that this user alone may read and write; remove it")


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, kind: int, byte: int) -> bool:
    """Take a lock of this open file, change its kind, or give it back; whether that was possible at once."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


@contextmanager
def _closing_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
