"""Keys of clients and of the operator, and the server's secret: read from settings and files."""

import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from emberkv.config import ServeConfig, usable_key
from emberkv.errors import ConfigError
from emberkv.trusted_paths import open_own_file
from emberkv.whole_file import drafted, remove_leftovers

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
        admin=one_key("--admin-key-file", config.admin_key, config.admin_key_file),
        metrics=one_key("--metrics-key-file", config.metrics_key, config.metrics_key_file),
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


def one_key(option: str, given: SecretStr | None, path: Path | None) -> str | None:
    """The key that is given, or that a file holds, which ``option`` names. Raises ConfigError for another file."""
    if path is None:
        return None if given is None else given.get_secret_value()
    keys = read_keys(option, path)
    if len(keys) > 1:
        raise ConfigError(f"{option} {path} holds {len(keys)} keys; it must hold one")
    return keys[0]


SECRET_BYTES = 32
SECRET_FILE = "secret"  # noqa: S105 - a file's name


def server_secret(given: str | None, cache_dir: Path | None) -> bytes:
    """What was ``given``, else what the file ``secret`` in ``cache_dir`` holds, which is made where there is none.

    Without a folder, and with a warning in one that cannot be written, it is random: what tenants have cached on disk
    is found again by no later process. Raises ConfigError for a file that does not hold a secret, and
    UntrustedPathError for one that another user may have written.
    """
    if given is not None:
        return given.encode()
    if cache_dir is None:
        return os.urandom(SECRET_BYTES)
    path = cache_dir / SECRET_FILE
    remove_leftovers(cache_dir, re.escape(SECRET_FILE))
    try:
        return _read(path) if os.path.lexists(path) else _create(path)
    except OSError as error:
        _log.warning("no secret can be kept as %s (%s); tenants' cached blocks end with this run", path, error.strerror)
        return os.urandom(SECRET_BYTES)


def _read(path: Path) -> bytes:
    with os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as file:
        others = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        secret = file.read(SECRET_BYTES + 1)
    if others:
        _log.warning("the secret %s is open to other users; it should be readable by its owner only", path)
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path} is no secret: it must hold {SECRET_BYTES} bytes; delete it to have a new one made")
    return secret


def _create(path: Path) -> bytes:
    """Write a whole file first and then give it its name, unless another process was sooner: then read that one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = os.urandom(SECRET_BYTES)
    with drafted(path, secret) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            return _read(path)
    return secret
