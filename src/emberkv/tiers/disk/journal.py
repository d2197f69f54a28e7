"""The journal of a cache folder: what the writing process has stored and removed, for the others to follow.

    + <size in bytes> <time of last use in ns> <path below the blocks' folder>
    - <path>

The writer appends, and begins a new file when it opens the folder, when the file has grown large and when it was
removed. A reader sees that another file has the journal's name, and scans the folder again.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from emberkv.files import open_own_file
from emberkv.tiers.disk.files import JOURNAL, TEMPORARY, BlockFile, parse_path

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
