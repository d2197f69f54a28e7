"""How the disk tier's folder is laid out: a block's file name says all that an index needs to know.

    FOLDER/blocks/lock                              held by the one process that writes
    FOLDER/blocks/tmp/                              files being written
    FOLDER/blocks/<namespace>/@<owner>/<identity>.kv       a block; .near.kv where it is not exact

Namespace and identity are in hexadecimal. So an index is rebuilt from names, sizes and times, without opening a file.
What else lies in FOLDER belongs to others and is left alone.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from emberkv.errors import CacheFolderError

BLOCKS = "blocks"
LOCK = "lock"
TEMPORARY = "tmp"
MAX_OWNER_BYTES = 200
"""Of an owner's name as a folder's; file systems take 255."""

_EXACT = ".kv"
_NEAR = ".near.kv"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class BlockFile(NamedTuple):
    """A stored block as its name tells it. size: bytes. mtime_ns: when it was last of use."""

    namespace: bytes
    identity: bytes
    owner: str
    exact: bool
    size: int
    mtime_ns: int

    @property
    def key(self) -> bytes:
        """One for each block of each model."""
        return self.namespace + self.identity

    @property
    def path(self) -> str:
        """The file, below the blocks' folder."""
        ending = _EXACT if self.exact else _NEAR
        return f"{self.namespace.hex()}/{owner_folder(self.owner)}/{self.identity.hex()}{ending}"


def owner_folder(owner: str) -> str:
    """A folder's name from which `owner_of` reads the owner again; equal only for equal owners, in any letter case."""
    return "@" + "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in owner.encode())


def owner_of(folder: str) -> str:
    return unquote(folder[1:])


def scan(blocks: Path) -> Iterator[BlockFile]:
    """Every block below ``blocks``, of all models, in no order. Names that are not ours are passed over.

    Raises CacheFolderError where a folder cannot be read.
    """
    try:
        for namespace_folder in _folders(blocks):
            namespace = _unhex(namespace_folder.name)
            if namespace is not None:
                for folder in _folders(namespace_folder.path):
                    if folder.name.startswith("@"):
                        yield from _scan_owner(folder.path, namespace, owner_of(folder.name))
    except OSError as error:
        raise CacheFolderError(f"cache folder {blocks} cannot be read: {error.strerror}") from error


def _scan_owner(folder: str, namespace: bytes, owner: str) -> Iterator[BlockFile]:
    with os.scandir(folder) as found:
        for each in found:
            name, dot, ending = each.name.partition(".")
            identity = _unhex(name)
            if identity is None or dot + ending not in (_EXACT, _NEAR) or not each.is_file(follow_symlinks=False):
                continue
            try:
                status = each.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process, which writes here, has just evicted it
                continue
            yield BlockFile(namespace, identity, owner, dot + ending == _EXACT, status.st_size, status.st_mtime_ns)


def _folders(path: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(path) as found:
        return [each for each in found if each.is_dir(follow_symlinks=False)]


def _unhex(name: str) -> bytes | None:
    try:
        return bytes.fromhex(name) or None
    except ValueError:
        return None
