"""Learned prefixes on disk: token ids and scores, never text, in a file that is whole or not there.

The first line is JSON with format, version and the checksum of what follows: JSON with the model's namespace, the time,
and the prefixes.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from xxhash import xxh3_128_hexdigest

from emberkv.core.analytics.popularity import PopularPrefix, full_tokens
from emberkv.errors import PrefixFileError, UntrustedPathError
from emberkv.trusted_paths import open_own_file
from emberkv.whole_file import replace_file

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
