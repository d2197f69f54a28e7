"""Keys that clients send: where they are read from, and which cannot be used."""

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from emberkv.config import ServeConfig, usable_key
from emberkv.errors import ConfigError

_MOST_BYTES = 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerKeys:
    """api: each a tenant of its own. admin, metrics: None where none is set."""

    api: tuple[str, ...]
    admin: str | None
    metrics: str | None


def server_keys(config: ServeConfig) -> ServerKeys:
    """The keys that are given themselves or by files. Raises ConfigError for a file that holds none, or not one."""
    files = () if config.api_key_file is None else read_keys("--api-key-file", config.api_key_file)
    return ServerKeys(
        api=(*(key.get_secret_value() for key in config.api_keys), *files),
        admin=_one_key("--admin-key-file", config.admin_key, config.admin_key_file),
        metrics=_one_key("--metrics-key-file", config.metrics_key, config.metrics_key_file),
    )


def read_keys(option: str, path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; blank lines are passed over. Warns of a file that other users may read.

    option: what names the file, as typed. Raises ConfigError for a file that cannot be read or holds no key, and for a
    line that is no usable key.
    """
    try:
        with path.open("rb") as file:
            open_to = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{option} {path} has more than {_MOST_BYTES:,} bytes; it must hold one key a line")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is not UTF-8 at byte {error.start}; it must hold one key a line") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                keys.append(usable_key(line.strip()))
            except ValueError as error:
                raise ConfigError(f"{option} {path}, line {number}: {error}") from error
    if not keys:
        raise ConfigError(f"{option} {path} holds no key; write one key a line, or leave the option out")
    if open_to:
        _log.warning("the keys in %s are open to other users; the file should be readable by its owner only", path)
    return tuple(keys)


def _one_key(option: str, given: SecretStr | None, path: Path | None) -> str | None:
    if path is None:
        return None if given is None else given.get_secret_value()
    keys = read_keys(option, path)
    if len(keys) > 1:
        raise ConfigError(f"{option} {path} holds {len(keys)} keys; it must hold one")
    return keys[0]
