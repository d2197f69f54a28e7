"""How the disk tier's folder is laid out: a block's file name says all that an index needs to know.

    FOLDER/blocks/lock                              held by the one process that writes
    FOLDER/blocks/journal                           what it has stored and removed, see `journal`
    FOLDER/blocks/tmp/                              files being written
    FOLDER/blocks/<namespace>/@<owner>/<block hash>.kv       a block; .near.kv where it is not exact

Namespace and block hash are in hexadecimal. So an index is rebuilt from names, sizes and times, without opening a file.
What else lies in FOLDER belongs to others and is left alone.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from emberkv.errors import CacheFolderError

BLOCKS = "blocks"
LOCK = "lock"
JOURNAL = "journal"
TEMPORARY = "tmp"
MAX_OWNER_BYTES = 200
"""Of an owner's name as a folder's; file systems take 255."""

_EXACT = ".kv"
_NEAR = ".near.kv"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class BlockFile(NamedTuple):
    """A stored block as its name tells it. size: bytes. mtime_ns: when it was last of use."""

    namespace: bytes
    block_hash: bytes
    owner: str
    exact: bool
    size: int
    mtime_ns: int

    @property
    def key(self) -> bytes:
        """One for each block of each model."""
        return self.namespace + self.block_hash

    @property
    def path(self) -> str:
        """The file, below the blocks' folder."""
        ending = _EXACT if self.exact else _NEAR
        return f"{self.namespace.hex()}/{owner_folder(self.owner)}/{self.block_hash.hex()}{ending}"


def owner_folder(owner: str) -> str:
    """A folder's name from which `owner_of` reads the owner again; equal only for equal owners, in any letter case."""
    return "@" + "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in owner.encode())


def owner_of(folder: str) -> str:
    return unquote(folder[1:])


def parse_path(path: str, size: int, mtime_ns: int) -> BlockFile | None:
    """The block whose `BlockFile.path` this is; None where it is not one, as for a name that other programs gave."""
    namespace, _, rest = path.partition("/")
    folder, _, name = rest.partition("/")
    place = _parse_folder(namespace, folder)
    found = _parse_name(name)
    return BlockFile(place[0], found[0], place[1], found[1], size, mtime_ns) if place and found else None


def scan(blocks: Path, passed_over: Callable[[str], None] = lambda _: None) -> Iterator[BlockFile]:
    """Every block below ``blocks``, of all models, in no order.

    passed_over: called with the path of each other file or folder where only blocks are expected. Raises
    CacheFolderError where a folder cannot be read.
    """
    try:
        for namespace in _folders(blocks):
            if namespace.name == TEMPORARY:
                continue
            for folder in _folders(namespace.path):
                place = _parse_folder(namespace.name, folder.name)
                if place is None:
                    passed_over(f"{namespace.name}/{folder.name}")
                else:
                    yield from _scan_owner(folder.path, *place, passed_over)
    except OSError as error:
        raise CacheFolderError(f"cache folder {blocks} cannot be read: {error.strerror}") from error


def _scan_owner(folder: str, namespace: bytes, owner: str, passed_over: Callable[[str], None]) -> Iterator[BlockFile]:
    with os.scandir(folder) as found:
        for each in found:
            block = _parse_name(each.name)
            if block is None or not each.is_file(follow_symlinks=False):
                passed_over(f"{namespace.hex()}/{owner_folder(owner)}/{each.name}")
                continue
            try:
                status = each.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process, which writes here, has just evicted it
                continue
            yield BlockFile(namespace, block[0], owner, block[1], status.st_size, status.st_mtime_ns)


def _parse_folder(namespace: str, folder: str) -> tuple[bytes, str] | None:
    """Namespace and owner, where these names are the ones that `BlockFile.path` gives them."""
    model, owner = _unhex(namespace), owner_of(folder)
    return (model, owner) if model and model.hex() == namespace and owner_folder(owner) == folder else None


def _parse_name(name: str) -> tuple[bytes, bool] | None:
    """Block hash and exactness, where this is the file's name that `BlockFile.path` gives them."""
    stem, dot, ending = name.partition(".")
    block_hash = _unhex(stem)
    if block_hash is None or block_hash.hex() != stem or dot + ending not in (_EXACT, _NEAR):
        return None
    return block_hash, dot + ending == _EXACT


def _folders(path: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(path) as found:
        return [each for each in found if each.is_dir(follow_symlinks=False)]


def _unhex(name: str) -> bytes | None:
    try:
        return bytes.fromhex(name) or None
    except ValueError:
        return None
