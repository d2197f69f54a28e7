"""Files and folders that this process relies on: they must be its own user's or root's, and no link leads elsewhere.

A folder that another user can write to can hold a planted secret, forged blocks, or a link to a file that this process
would then overwrite or delete.
"""

import os
import stat
from pathlib import Path

from emberkv.errors import UntrustedPathError


def check_owner(path: Path) -> None:
    """Raises UntrustedPathError where ``path`` is another user's or all users may write to it, OSError where it is not.

    A link is followed: what counts is who owns the file or folder that it leads to.
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
