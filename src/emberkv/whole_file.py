"""Small files that are whole or not there: written as a draft beside their place, then put into it.

A process that is killed meanwhile leaves its draft, which the next process to open the file removes.
"""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
