"""Files that this process relies on: whose they may be, how they are opened, and how small ones are written whole.

A folder that another user can write to can hold a planted secret, forged blocks, or a link to a file that this process
would then overwrite or delete. So the files must belong to this user or root, and links are not followed.

A small file is written as a draft beside its place, then put into it. A process that is killed meanwhile leaves its
draft, which the next process to open the file removes.
"""

import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from emberkv.errors import UntrustedPathError


def check_owner(path: Path) -> None:
    """Raises UntrustedPathError where ``path`` is another user's or all users may write to it, OSError where it is not.

    A link is followed: what counts is the owner of the file or folder that it leads to.
    """
    _check(path, path.stat())


def open_own_file(path: Path | str, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a regular file, as `os.open` gives it, that never follows a link and never waits for a FIFO.

    Raises OSError, with ELOOP for a link, and UntrustedPathError for a file of another user's or of another kind.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UntrustedPathError(f"{path} is not a regular file; remove it")
        _check(path, found)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_own_file(path: Path | str) -> bytes:
    """The whole of a file that `open_own_file` opens. Raises as it does."""
    with os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _check(path: Path | str, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.getuid()):
        raise UntrustedPathError(
            f"{path} belongs to user id {found.st_uid}, and this process runs as {os.getuid()}; give a path of its own"
        )
    if found.st_mode & stat.S_IWOTH:
        raise UntrustedPathError(
            f"{path} can be written by all users; give a path of your own, or take that right away"
        )


LEFTOVER_SECONDS = 3600.0
"""Writing a draft takes moments: no process, of several on one folder, still writes one as old as this."""

_DRAFT = r"\.?[a-z0-9_]{8}\.tmp"  # the letters that tempfile draws


@contextmanager
def drafted(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside ``path`` that holds ``content``, synced, readable by this user only; gone afterwards, unless moved.

    Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Put a whole file in the place of ``path``. Raises OSError, and then the old one is still there."""
    with drafted(path, content) as draft:
        draft.replace(path)


def remove_leftovers(folder: Path, names: str) -> int:
    """Delete the old drafts of files in ``folder``; how many. names: a pattern of the whole names of these files.

    One that cannot be deleted stays, and does no harm.
    """
    draft = re.compile(names + _DRAFT)
    oldest = time.time() - LEFTOVER_SECONDS
    count = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not draft.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)
                    count += 1
    return count
