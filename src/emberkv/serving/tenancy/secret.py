"""The server's secret, which tenants' salts are derived with; it must outlive the process if cached blocks do."""

import logging
import os
import re
import stat
from pathlib import Path

from emberkv.errors import ConfigError
from emberkv.trusted_paths import open_own_file
from emberkv.whole_file import drafted, remove_leftovers

SECRET_BYTES = 32
SECRET_FILE = "secret"  # noqa: S105 - a file's name

_log = logging.getLogger(__name__)


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
