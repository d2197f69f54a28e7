"""What glibc's allocator keeps of the memory that a process frees."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt
_LOADING = 4 << 20
"""Above what is allocated for each of the many slices in which a weight is rounded, which is reused. With 1 MiB it was
mapped anew each time, and loading 494M parameters in 8 bits took 17% more CPU time."""
_MAPPED_ALONE, _KEPT_FREE = 32 << 20, 64 << 20
"""The largest to which glibc raises its thresholds by itself, as it soon does in a server of any model."""
_MOST_MAPPED = 1 << 14
"""Pieces that are mapped alone, far below the 65,530 mappings that Linux gives a process."""
_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"
"""The environment's, which take precedence."""


def return_freed_memory() -> None:
    """Give the system back what was freed between pieces that are in use. It takes milliseconds."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within this context freed memory goes back to the system at once, and when it ends, what has not.

    Loading a model allocates several times what is left of it. glibc raises its thresholds with each large piece that
    is freed, and a thread's arena then keeps up to 64 MiB at its end, which `return_freed_memory` does not reach.
    Behind the context large pieces are reused, as each step allocates some anew.

    It is for the whole process, so for a server, not for a library. Where there is no glibc, or the environment has
    settings for it, thresholds stay as they are.
    """
    libc = _libc()
    adjusts = hasattr(libc, "mallopt") and not any(name in os.environ for name in _SETTINGS)
    if adjusts:
        libc.mallopt(_MMAP_MAX, _MOST_MAPPED)
        libc.mallopt(_MMAP_THRESHOLD, _LOADING)
        libc.mallopt(_TRIM_THRESHOLD, _LOADING)
    try:
        yield
    finally:
        if adjusts:
            libc.mallopt(_MMAP_THRESHOLD, _MAPPED_ALONE)
            libc.mallopt(_TRIM_THRESHOLD, _KEPT_FREE)
        return_freed_memory()


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
