"""The identity of a model's weights: by their content, never by their name or their times."""

from pathlib import Path

import xxhash

from emberkv.engine.torch.model.checkpoint import weight_files

_CHUNK_BYTES = 4 << 20

FileState = tuple[int, int, int, int, int]
"""Device, inode, size, and times of modification and change in nanoseconds."""


def weights_fingerprint(folder: Path) -> str:
    """Hex identity of the weights and config in ``folder``, the same wherever equal files lie.

    Every byte is read each time, and links are followed: times, sizes and names of files can be copied from another
    model's. Loading needs the same bytes next, and then finds them in the page cache. Tokenizer files do not count.

    Raises the errors of ``weight_files``, and OSError when a file cannot be read.
    """
    whole = xxhash.xxh3_128()
    whole.update((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        whole.update(f"\0{path.name}\0{_content_hash(path)}".encode())
    return whole.hexdigest()


def file_states(folder: Path) -> list[FileState]:
    """What shows that the files of `weights_fingerprint` were written to or replaced between two calls."""
    found = [path.stat() for path in (folder / "config.json", *weight_files(folder))]
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]


def _content_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
