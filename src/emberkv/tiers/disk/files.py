"""The files of the disk tier: how its folder is laid out, and all operations on it.

    FOLDER/blocks/lock                              held by the one process that writes
    FOLDER/blocks/journal                           what it has stored and removed, see `index`
    FOLDER/blocks/tmp/                              files being written
    FOLDER/blocks/<namespace>/@<owner>/<block hash>.kv       a block; .near.kv where it is not exact
    FOLDER/blocks/<namespace>/@<owner>/<block hash>.<parent>.<count>.part.kv
                                                    a partial block of so many tokens, which is exact;
                                                    <parent>.<previous>.<count> where these differ, see `PartialPlace`

Namespace and hashes are in hexadecimal, a count is decimal. A block's file name says all that an index needs to know,
so an index is rebuilt from names, sizes and times, without opening a file. What else lies in FOLDER belongs to others
and is left alone.

Nothing is synced. What a killed process wrote is complete, because a file gets its name only when it is; a machine that
loses power may lose recent blocks or leave damaged ones, which the checksum finds.
"""

import errno
import fcntl
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from emberkv.errors import BlockError, CacheFolderError, UntrustedPathError
from emberkv.files import check_owner, open_own_file
from emberkv.tiers.codec import verified_record
from emberkv.tiers.partial import PartialPlace

BLOCKS = "blocks"
LOCK = "lock"
JOURNAL = "journal"
TEMPORARY = "tmp"
MAX_OWNER_BYTES = 200
"""Of an owner's name as a folder's; file systems take 255."""

_EXACT = ".kv"
_NEAR = ".near.kv"
_PARTIAL = ".part.kv"
_COUNT = re.compile("[1-9][0-9]{0,8}")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class BlockFile(NamedTuple):
    """A stored block, as its file name describes it. size: bytes. mtime_ns: when it was last of use. partial: where it
    lies, if it is a partial block.
    """

    namespace: bytes
    block_hash: bytes
    owner: str
    exact: bool
    size: int
    mtime_ns: int
    partial: PartialPlace | None = None

    @property
    def key(self) -> bytes:
        """One for each block of each model."""
        return self.namespace + self.block_hash

    @property
    def path(self) -> str:
        """The file, below the blocks' folder."""
        name = _file_name(self.block_hash, exact=self.exact, partial=self.partial)
        return f"{self.namespace.hex()}/{owner_folder(self.owner)}/{name}"


def _file_name(block_hash: bytes, *, exact: bool, partial: PartialPlace | None) -> str:
    if partial is None:
        return f"{block_hash.hex()}{_EXACT if exact else _NEAR}"
    parts = [block_hash.hex(), partial.parent.hex()]
    if partial.previous != partial.parent:
        parts.append(partial.previous.hex())
    return ".".join([*parts, str(partial.count)]) + _PARTIAL


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
    return BlockFile(place[0], found[0], place[1], found[1], size, mtime_ns, found[2]) if place and found else None


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
            size, mtime_ns = status.st_size, status.st_mtime_ns
            yield BlockFile(namespace, block[0], owner, block[1], size, mtime_ns, block[2])


def _parse_folder(namespace: str, folder: str) -> tuple[bytes, str] | None:
    """Namespace and owner, where these names are the ones that `BlockFile.path` gives them."""
    model, owner = _unhex(namespace), owner_of(folder)
    return (model, owner) if model and model.hex() == namespace and owner_folder(owner) == folder else None


def _parse_name(name: str) -> tuple[bytes, bool, PartialPlace | None] | None:
    """Block hash, exactness and place, where this is the file's name that `BlockFile.path` gives them."""
    stem, dot, ending = name.partition(".")
    block_hash = _unhex(stem)
    if block_hash is None or block_hash.hex() != stem:
        return None
    if dot + ending in (_EXACT, _NEAR):
        return block_hash, dot + ending == _EXACT, None
    partial = _parse_place(ending)
    if partial is None or _file_name(block_hash, exact=True, partial=partial) != name:
        return None
    return block_hash, True, partial


def _parse_place(ending: str) -> PartialPlace | None:
    """What follows a partial block's hash in its name."""
    match ending.removesuffix(_PARTIAL).split("."):
        case [parent, count]:
            place = _unhex(parent), _unhex(parent)
        case [parent, previous, count]:
            place = _unhex(parent), _unhex(previous)
        case _:
            return None
    if place[0] is None or place[1] is None or _COUNT.fullmatch(count) is None:
        return None
    return PartialPlace(place[0], place[1], int(count))


def _folders(path: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(path) as found:
        return [each for each in found if each.is_dir(follow_symlinks=False)]


def _unhex(name: str) -> bytes | None:
    try:
        return bytes.fromhex(name) or None
    except ValueError:
        return None


_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Never through a link, and a FIFO in a block's place is not waited for."""


class BlockFiles:
    """Files below FOLDER/blocks, by their path there. All methods but the constructor raise OSError.

    Creates what is missing of the folder, as far as it may. Raises CacheFolderError where there is none then.
    """

    def __init__(self, folder: Path) -> None:
        self.blocks = folder / BLOCKS
        self._root = str(self.blocks)
        self._temporary = str(self.blocks / TEMPORARY)
        self._names = itertools.count()
        try:
            folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            self.blocks.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        except OSError as error:
            if not self.blocks.is_dir():
                raise CacheFolderError(
                    f"cache folder {folder} cannot be used: {error.strerror}; give a folder that exists or can be made"
                ) from error
        try:
            check_owner(folder)
            check_owner(self.blocks)
        except UntrustedPathError as error:
            raise CacheFolderError(f"cache folder {folder} is not trusted: {error}") from error

    def lock(self) -> int | None:
        """Become the process that writes here: a descriptor that keeps the lock until closed; None where another
        has it.

        An empty folder in the lock's place is removed.
        """
        path = self.blocks / LOCK
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        try:
            descriptor = open_own_file(path, os.O_RDWR | os.O_CREAT)
        except UntrustedPathError as error:
            raise OSError(errno.EPERM, str(error)) from error
        try:
            self.take_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return descriptor

    def take_lock(self, descriptor: int) -> None:
        """Lock an open file. Raises BlockingIOError where another process has the lock."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def holds(self, lock: int) -> bool:
        """Whether a descriptor of `lock` still is the lock of this folder, which may have been moved or replaced."""
        try:
            there = os.stat(self.blocks / LOCK, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(lock))

    def exists(self) -> bool:
        return self.blocks.is_dir()

    def scan(self) -> Iterator[BlockFile]:
        """Every block that is there. Raises CacheFolderError instead of OSError."""
        return scan(self.blocks)

    def tidy(self) -> int:
        """Make the folder private, remove what an interrupted writer left; how many entries of its folder for
        temporary files are not files and were left alone. Needs the lock.
        """
        self.blocks.chmod(_FOLDER_MODE)
        self._make_folder(self._temporary)
        folder = os.open(self._temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        left = 0
        try:
            for name in os.listdir(folder):
                try:
                    os.unlink(name, dir_fd=folder)
                except (IsADirectoryError, PermissionError):  # Linux and macOS say it so of a folder
                    left += 1
        finally:
            os.close(folder)
        return left

    def read(self, path: str) -> bytes:
        descriptor = os.open(f"{self._root}/{path}", os.O_RDONLY | _SAFELY)
        try:
            return _read_all(descriptor)
        finally:
            os.close(descriptor)

    def write(self, path: str, data: bytes, stamp_ns: int) -> None:
        """Put the file in its place in one step. stamp_ns: its time of last use."""
        temporary = f"{self._temporary}/{os.getpid()}-{next(self._names)}"
        try:
            self._write_temporary(temporary, data, stamp_ns)
            self._move(temporary, f"{self._root}/{path}")
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def put_bytes(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data``, from its first byte on; how many."""
        return os.write(descriptor, data)

    def stamp(self, path: str, stamp_ns: int) -> None:
        os.utime(f"{self._root}/{path}", ns=(stamp_ns, stamp_ns))

    def unlink(self, path: str) -> None:
        """Remove the file; one that is gone already is fine."""
        Path(f"{self._root}/{path}").unlink(missing_ok=True)

    def _write_temporary(self, path: str, data: bytes, stamp_ns: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, _FILE_MODE)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self.put_bytes(descriptor, rest) :]
            os.utime(descriptor, ns=(stamp_ns, stamp_ns))
        finally:
            os.close(descriptor)

    def _move(self, temporary: str, path: str) -> None:
        try:
            os.replace(temporary, path)
        except FileNotFoundError:  # its first block of this model and owner, or the folder was removed
            parent = os.path.dirname(path)
            self._make_folder(os.path.dirname(parent))
            self._make_folder(parent)
            os.replace(temporary, path)

    def _make_folder(self, path: str) -> None:
        Path(path).mkdir(mode=_FOLDER_MODE, exist_ok=True)


def _read_all(descriptor: int) -> bytes:
    """In one call, as files of blocks do not grow; a rest beyond what one call gives is read too."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    wanted = found.st_size
    data = os.read(descriptor, wanted)
    while len(data) < wanted:
        more = os.read(descriptor, wanted - len(data))
        if not more:
            break
        data += more
    return data


def verify(files: BlockFiles, listed: Iterable[BlockFile]) -> Iterator[tuple[BlockFile, str | None]]:
    """Each file that is still there, with what is wrong with it, or None. Nothing is changed."""
    for file in listed:
        try:
            data = files.read(file.path)
            verified_record(
                data,
                namespace=file.namespace,
                block_hash=file.block_hash,
                exact=file.exact,
                partial=file.partial,
            )
        except FileNotFoundError:  # evicted by the process that writes here
            continue
        except OSError as error:
            yield file, f"unreadable: {error.strerror}"
        except BlockError as error:
            yield file, error.fault
        else:
            yield file, None
