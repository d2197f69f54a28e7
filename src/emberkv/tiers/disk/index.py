"""The disk tier's index: which files there are, how large they are, and which of them go when space is short; and the
journal by which other processes follow it, which says what the writing process has stored and removed.

Pure bookkeeping in memory, without a lock: the tier holds one around each call, and does the file work outside of it.

    + <size in bytes> <time of last use in ns> <path below the blocks' folder>
    - <path>

The writer appends, and begins a new file when it opens the folder, when the file has grown large and when it was
removed. A reader sees that another file has the journal's name, and scans the folder again.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from emberkv.core.policies.eviction import EntryCost, EvictionPolicy
from emberkv.files import open_own_file
from emberkv.tiers.base import PolicyFactory
from emberkv.tiers.disk.files import JOURNAL, TEMPORARY, BlockFile, parse_path
from emberkv.tiers.partial import PartialIndex

MAX_BYTES = 8 * 2**20
"""Of a journal, about 50,000 changes; the next change begins a new one."""


class Change(NamedTuple):
    """file: of a removal, without its size and time. stored: False: removed."""

    file: BlockFile
    stored: bool


class JournalWriter:
    """Appends changes to the journal of a folder. Methods raise OSError; the next `append` begins a new file then."""

    def __init__(self, blocks: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = blocks / JOURNAL
        self._draft = blocks / TEMPORARY / f"{JOURNAL}-{os.getpid()}"
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        self._size = 0

    def begin(self) -> None:
        """Put an empty journal in the place of the one before, which has all readers scan the folder again."""
        self.close()
        descriptor = open_own_file(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        try:
            self._draft.replace(self._path)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._size = descriptor, 0

    def append(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        if self._descriptor is None or self._size > self._max_bytes or not os.fstat(self._descriptor).st_nlink:
            self.begin()
        assert self._descriptor is not None
        lines = "".join(map(_line, changes)).encode()
        try:
            if os.write(self._descriptor, lines) < len(lines):
                self.close()  # a reader would take the next line for the rest of this one
        except OSError:
            self.close()
            raise
        self._size += len(lines)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class JournalReader:
    """Follows a journal from where it ended when it was opened."""

    def __init__(self, blocks: Path) -> None:
        self._path = blocks / JOURNAL
        self._descriptor: int | None = None
        self._opened: os.stat_result | None = None  # of the descriptor; nothing else has its number while it is open
        self._offset = 0

    def changes(self) -> Iterable[Change] | None:
        """What has changed since the last call; None where that is not known and the folder must be scanned.

        Costs one system call where nothing has changed. Raises OSError where there is no journal.
        """
        found = os.stat(self._path, follow_symlinks=False)
        same = self._opened is not None and os.path.samestat(found, self._opened)
        size = found.st_size
        if self._descriptor is None or not same or size < self._offset:
            self._open()
            return None
        if size == self._offset:
            return ()
        data = os.pread(self._descriptor, size - self._offset, self._offset)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return filter(None, map(_change, whole.decode("ascii", "replace").splitlines()))

    def _open(self) -> None:
        """What the journal says already is in the folder that the caller is about to scan."""
        self.close()
        self._descriptor = open_own_file(self._path, os.O_RDONLY)
        self._opened = os.fstat(self._descriptor)
        self._offset = self._opened.st_size

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(change: Change) -> str:
    file = change.file
    return f"+ {file.size} {file.mtime_ns} {file.path}\n" if change.stored else f"- {file.path}\n"


def _change(line: str) -> Change | None:
    match line.split(" "):
        case ["+", size, mtime_ns, path] if size.isdecimal() and mtime_ns.isdecimal():
            file = parse_path(path, int(size), int(mtime_ns))
            return Change(file, stored=True) if file else None
        case ["-", path]:
            file = parse_path(path, 0, 0)
            return Change(file, stored=False) if file else None
        case _:
            return None


class DiskIndex:
    """Files by key, within ``max_bytes``. What is being written is reserved, so that the limit holds meanwhile too."""

    def __init__(self, max_bytes: int, policy: PolicyFactory) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.bytes_by_owner: Counter[str] = Counter()
        self._partial: defaultdict[bytes, PartialIndex] = defaultdict(PartialIndex)  # by namespace
        self._files: dict[bytes, BlockFile] = {}
        self._unreadable: set[bytes] = set()
        self._last_stamp = 0
        self._reserved = 0
        self._policy: EvictionPolicy[bytes] = policy()

    def __len__(self) -> int:
        return len(self._files)

    def fill(self, files: Iterable[BlockFile]) -> list[BlockFile]:
        """Enter what an earlier process left, least recently used first. Returns what must go.

        Of two files of one block the exact one stays, of alike ones the more recent.
        """
        kept: dict[bytes, BlockFile] = {}
        gone = []
        for file in files:
            other = kept.setdefault(file.key, file)
            if other is not file:
                worse, kept[file.key] = sorted((other, file), key=lambda each: (each.exact, each.mtime_ns))
                gone.append(worse)
        for key, file in sorted(kept.items(), key=lambda item: (item[1].mtime_ns, item[0])):
            self._enter(key, file)
            self._last_stamp = file.mtime_ns
        return gone + self._excess()

    def note(self, file: BlockFile) -> list[BlockFile]:
        """Enter a file that another process has written. Returns what must go for it."""
        self.discard(file.key)
        self._enter(file.key, file)
        self._last_stamp = max(self._last_stamp, file.mtime_ns)
        return self._excess()

    def find(self, key: bytes) -> BlockFile | None:
        """A file that can be loaded."""
        return None if key in self._unreadable else self._files.get(key)

    def get(self, key: bytes) -> BlockFile | None:
        """A file that is there, readable or not."""
        return self._files.get(key)

    def partial_of(self, namespace: bytes) -> PartialIndex:
        """The partial blocks of a model, for look-ups, which need no lock."""
        return self._partial.get(namespace) or PartialIndex()

    def files(self) -> list[BlockFile]:
        return list(self._files.values())

    def add(self, file: BlockFile) -> list[BlockFile]:
        """Enter a file, in place of one with its key if there is one. Returns those that a quota forbids to keep."""
        self.discard(file.key)
        self._enter(file.key, file)
        return self._surplus()

    def discard(self, key: bytes) -> list[BlockFile]:
        """Strike a file off; the list of it, empty where there was none."""
        if key not in self._files:
            return []
        self._policy.discard(key)
        return [self._strike(key)]

    def set_aside(self, file: BlockFile) -> None:
        """It cannot be read, or not be removed: still there and counted, but not found until it is stored again."""
        if self._files.get(file.key) is file:
            self._unreadable.add(file.key)

    def used(self, keys: Sequence[bytes], now_ns: int) -> list[tuple[BlockFile, int]]:
        """The files found, now the most recent, and the time to write on each; the first one's is the latest."""
        found = [file for key in keys if (file := self.find(key))]
        self._policy.access([file.key for file in reversed(found)])
        last = self.stamp(now_ns, len(found))
        return list(zip(found, range(last, last - len(found), -1), strict=True))

    def stamp(self, now_ns: int, count: int = 1) -> int:
        """The last of ``count`` times, all later than any before: the order of use survives a clock set back."""
        self._last_stamp = max(self._last_stamp + count, now_ns)
        return self._last_stamp

    def reserve(self, size: int, owner: str) -> tuple[bool, list[BlockFile]]:
        """Make room for ``size`` bytes and keep it. Returns whether there is room, and what had to go for it.

        There is none where all that could go is guaranteed to others, or is being written.
        """
        gone: list[BlockFile] = []
        while self.bytes + self._reserved + size > self.max_bytes:
            if not self._policy.available_to(owner):
                return False, gone
            gone.append(self._strike(self._policy.evict_for(owner)))
        self._reserved += size
        return True, gone

    def unreserve(self, size: int) -> None:
        self._reserved -= size

    def _enter(self, key: bytes, file: BlockFile) -> None:
        self._files[key] = file
        self._count(file, +1)
        if file.partial is not None:
            self._partial[file.namespace].add(file.block_hash, file.partial)
        self._policy.admit(key, EntryCost(size=max(file.size, 1), owner=file.owner))
        self._policy.release((key,))

    def _excess(self) -> list[BlockFile]:
        gone = self._surplus()
        while self.bytes > self.max_bytes:
            gone.append(self._strike(self._policy.evict()))
        return gone

    def _surplus(self) -> list[BlockFile]:
        return [self._strike(key) for key in self._policy.evict_surplus()]

    def _strike(self, key: bytes) -> BlockFile:
        self._unreadable.discard(key)
        file = self._files.pop(key)
        self._count(file, -1)
        if file.partial is not None:
            self._partial[file.namespace].discard(file.block_hash)
        return file

    def _count(self, file: BlockFile, sign: int) -> None:
        self.bytes += sign * file.size
        self.bytes_by_owner[file.owner] += sign * file.size
