"""The identity of a model's weights: by their content, never by their name."""

import json
import logging
import re
from pathlib import Path

import xxhash

from emberkv.engine.checkpoint import weight_files
from emberkv.whole_file import remove_leftovers, replace_file

_log = logging.getLogger(__name__)

CACHE_FILE = "weight-hashes.json"
_CHUNK_BYTES = 4 << 20
_HUB_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a git blob's SHA-1, or the SHA-256 of a large file


def weights_fingerprint(folder: Path, cache_dir: Path | None) -> str:
    """Hex identity of the weights and config in ``folder``, the same wherever equal files lie.

    Files of a hub cache are known by the hash that the hub names them by; others are read and hashed, once
    for each (path, size, modification time) when ``cache_dir`` is given. Tokenizer files do not count.

    Raises the errors of ``weight_files``, and OSError when a file cannot be read.
    """
    hashes = _HashCache(cache_dir / CACHE_FILE if cache_dir is not None else None)
    whole = xxhash.xxh3_128()
    whole.update((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        whole.update(f"\0{path.name}\0{_hub_hash(path) or hashes.get(path)}".encode())
    return whole.hexdigest()


def _hub_hash(path: Path) -> str | None:
    """The content hash that a hub cache's link ``snapshots/<revision>/<file> -> ../../blobs/<hash>`` points to."""
    if not path.is_symlink():
        return None
    target = path.readlink()
    if target.parent.name != "blobs" or not _HUB_HASH.fullmatch(target.name):
        return None
    return target.name


def _content_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


class _HashCache:
    """Remembers the hashes of files that have not changed since, in one JSON file; None remembers nothing.

    Whatever is wrong with the JSON file costs a reading of the weights, never a wrong answer. One that cannot be used
    is told of once, and then left alone.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def get(self, path: Path) -> str:
        before = path.stat()
        key, state = str(path.resolve()), [before.st_size, before.st_mtime_ns]
        known = self._load().get(key)
        if known is not None and known[:2] == state:
            return str(known[2])
        digest = _content_hash(path)
        self._store(key, [*state, digest])
        return digest

    def _load(self) -> dict[str, list[int | str]]:
        if self._file is None:
            return {}
        try:
            content = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:  # half written by a machine that went down, say: as good as empty
            _log.warning("%s is no JSON and will be written anew, the weights being read again: %s", self._file, error)
            return {}
        except OSError as error:
            self._let_go(error)
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: entry for key, entry in content.items() if _is_entry(entry)}

    def _store(self, key: str, entry: list[int | str]) -> None:
        content = {**self._load(), key: entry}
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._file.parent, re.escape(self._file.name))
            replace_file(self._file, json.dumps(content).encode())
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        _log.warning("weights are read anew at each start, as %s cannot be used: %s", self._file, error)
        self._file = None


def _is_entry(entry: object) -> bool:
    match entry:
        case [int(), int(), str()]:
            return True
        case _:
            return False
