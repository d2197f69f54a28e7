"""The prefixes that use has shown to be worth most, kept in a file beside the disk tier for the next start to warm.

The file holds token ids and scores, never text, and is whole or not there. Its first line is JSON with format, version
and the checksum of what follows: JSON with the model's namespace, the time, and the prefixes.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from xxhash import xxh3_128_hexdigest

from emberkv.core.analytics.popularity import PopularPrefix, PrefixPopularity, full_tokens
from emberkv.core.hashing import BlockHash, Chain, decode_tokens
from emberkv.errors import EmberError, PrefixFileError, UntrustedPathError
from emberkv.files import open_own_file, remove_leftovers, replace_file
from emberkv.serving.warmup.warm_prompt import WarmPrompt
from emberkv.tiers.base import RemovalResult

MAX_FILE_BYTES = 64 * 2**20
FILE_NAMES = r"prefixes\.[0-9a-f]{16}\.json"
"""Pattern of the names that `prefix_file` gives, of whichever model."""

_STRICT = ConfigDict(extra="forbid", from_attributes=True, ser_json_bytes="base64", val_json_bytes="base64")


class _Head(BaseModel):
    model_config = _STRICT

    format: Literal["emberkv prefixes"] = "emberkv prefixes"
    version: Literal[1] = 1
    checksum: str


class _Prefix(BaseModel):
    model_config = _STRICT

    parent: int | None
    block_hash: bytes
    tokens: bytes
    owner: str
    score: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = _STRICT

    namespace: bytes
    saved_at: Annotated[float, Field(allow_inf_nan=False)]
    prefixes: tuple[_Prefix, ...]


def prefix_file(folder: Path, namespace: bytes) -> Path:
    """Where a model's prefixes are, in a cache's folder."""
    return folder / f"prefixes.{namespace[:8].hex()}.json"


def prefix_files(folder: Path) -> list[Path]:
    """The files of all models in a cache's folder."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(FILE_NAMES, path.name))


def write_prefixes(path: Path, prefixes: Sequence[PopularPrefix], *, namespace: bytes, saved_at: float) -> None:
    """Replace the file, atomically; only the user may read it. saved_at: seconds since 1970.

    Raises OSError, and then the old file is still there.
    """
    listed = tuple(_Prefix.model_validate(prefix) for prefix in prefixes)
    body = _Body(namespace=namespace, saved_at=saved_at, prefixes=listed).model_dump_json().encode()
    head = _Head(checksum=xxh3_128_hexdigest(body)).model_dump_json().encode()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, head + b"\n" + body)


def read_prefixes(path: Path, *, namespace: bytes) -> tuple[list[PopularPrefix], float]:
    """The prefixes, and when they were saved; none where there is no file.

    Raises PrefixFileError for a file that cannot be read, is damaged, of another version, or another model's.
    """
    try:
        with os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return [], 0.0
    except OSError as error:
        raise PrefixFileError(f"{path} cannot be read: {error.strerror}") from error
    except UntrustedPathError as error:
        raise PrefixFileError(f"it is not trusted: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise PrefixFileError(f"{path} has more than {MAX_FILE_BYTES:,} bytes")
    first, _, rest = content.partition(b"\n")
    try:
        head = _Head.model_validate_json(first)
        if head.checksum != xxh3_128_hexdigest(rest):
            raise PrefixFileError(f"{path} is damaged: its checksum does not fit")
        body = _Body.model_validate_json(rest)
        prefixes = [PopularPrefix(**dict(each)) for each in body.prefixes]
        full_tokens(prefixes)
    except (ValidationError, ValueError) as error:
        raise PrefixFileError(f"{path} is no list of prefixes of version 1") from error
    if body.namespace != namespace:
        raise PrefixFileError(f"{path} is another model's")
    return prefixes, body.saved_at


SAVE_SECONDS = 300.0
MAX_PREFIXES = 1000
LEAST_SCORE = 0.1
"""What one reuse counts for after a little more than three days."""

_log = logging.getLogger(__name__)


class LearnedPrompts:
    """Counts reuse, and keeps the result in a file. For any number of threads.

    folder: where the file goes. namespace: the model's; only its own prefixes are read. chain: a prompt's
    blocks as its tenant's requests name them; raises EmberError for an unknown tenant. clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        namespace: bytes,
        chain: Callable[[WarmPrompt], Chain],
        *,
        popularity: PrefixPopularity | None = None,
        save_seconds: float = SAVE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        remove_leftovers(folder, FILE_NAMES)
        self._path = prefix_file(folder, namespace)
        self._namespace = namespace
        self._chain = chain
        self._popularity = popularity if popularity is not None else PrefixPopularity()
        self._save_seconds = save_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = False
        self._saved_at = clock()
        self._restoring = threading.Lock()
        self._restored: list[tuple[WarmPrompt, Chain]] | None = None

    def used(self, chain: Chain, hit_tokens: int) -> None:
        """A request has reused the first ``hit_tokens`` of ``chain``."""
        if hit_tokens:
            with self._lock:
                self._popularity.used(chain, hit_tokens, self._clock())
                self._changed = True

    def restore(self) -> list[WarmPrompt]:
        """The prompts in the file, the best first, which are counted on from there. An unusable file is passed over.

        Left out are prefixes whose block hash is another now: those of tenants that have gone, or have another salt;
        and what `forget` has named. Further calls return the same.
        """
        with self._restoring:
            if self._restored is None:
                self._restored = self._read()
            return [prompt for prompt, _ in self._restored]

    def _read(self) -> list[tuple[WarmPrompt, Chain]]:
        try:
            prefixes, saved_at = read_prefixes(self._path, namespace=self._namespace)
        except PrefixFileError as error:
            _log.warning("learned prompts are not restored: %s", error)
            return []
        found, chains = [], []
        for prefix, tokens in zip(prefixes, full_tokens(prefixes), strict=True):
            prompt = WarmPrompt(decode_tokens(tokens), prefix.owner)
            chain = self._chain_of(prompt, prefix.block_hash)
            chains.append(chain)
            if chain is not None:
                found.append((prompt, chain))
        with self._lock:
            self._popularity.restore(prefixes, chains, saved_at)
        return found

    def forget(self, block_hashes: Collection[BlockHash] | None) -> RemovalResult:
        """Drop the prefixes with these blocks, all for None, here and in the file."""
        self.restore()
        with self._restoring:
            self._restored = [
                (prompt, chain)
                for prompt, chain in self._restored or ()
                if block_hashes is not None and not any(each in block_hashes for each in chain.block_hashes)
            ]
        with self._lock:
            count = self._popularity.forget(block_hashes)
            self._changed = self._changed or count > 0 or block_hashes is None
        failure = self.save()
        return RemovalResult(0, count, failure) if failure else RemovalResult(count)

    def save_when_due(self) -> float:
        """Save if it is time to; the seconds until it will be again."""
        due_in = self._saved_at + self._save_seconds - self._clock()
        if due_in > 0:
            return due_in
        self.save()
        return self._save_seconds

    def save(self) -> str:
        """Write the file, unless nothing is new, or delete it where there is nothing to write. A failure is logged, as
        the server's work does not depend on it, and returned; "" otherwise.
        """
        now = self._clock()
        self._saved_at = now
        with self._lock:
            if not self._changed:
                return ""
            best = self._popularity.best(now, least_score=LEAST_SCORE)[:MAX_PREFIXES]
            self._changed = False
        try:
            if best:
                write_prefixes(self._path, best, namespace=self._namespace, saved_at=now)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("learned prompts are not saved: %s: %s", self._path, error.strerror)
            self._changed = True  # so that they are the next time
            return error.strerror or type(error).__name__
        return ""

    def _chain_of(self, prompt: WarmPrompt, block_hash: BlockHash) -> Chain | None:
        try:
            chain = self._chain(prompt)
        except EmberError:  # a tenant that has gone
            return None
        return chain if chain.block_hashes and chain.block_hashes[-1] == block_hash else None
