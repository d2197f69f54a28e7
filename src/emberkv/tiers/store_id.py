"""Which store a tier is: ids that are equal in all processes that find the same blocks in it.

An id is a digest of the place and of the namespace of the blocks. Two names of one server give two ids, so that
processes that use it under both do not know that they share it. One id never stands for two stores, as long as a name
means the same server on all machines. Names that each machine resolves to itself, as localhost, have one id a machine.
"""

import os
import platform
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

ID_BYTES = 16

DEFAULT_PORT = 6379
"""Of a Redis or Valkey server."""

_LOOPBACK = ("", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_HOSTS_OF_CONTAINERS = (".docker.internal", ".containers.internal")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


def folder_id(folder: Path, namespace: bytes, name: str = "") -> bytes | None:
    """Of a folder of this machine, by whatever path it is reached. name: of the store within it. None where the folder
    cannot be looked at.
    """
    try:
        found = folder.stat()
    except OSError:
        return None
    return _digest(namespace, "folder", _machine(), f"{found.st_dev}:{found.st_ino}", name)


def server_id(url: str, namespace: bytes) -> bytes | None:
    """Of a server at ``SCHEME://[USER@]HOST[:PORT][/DATABASE]`` or ``unix://PATH``, whatever the user. None for a
    socket whose folder cannot be looked at.

    All names of loopback are one server, which each network of a machine's containers has for itself. The names by
    which containers reach their host are a server of this machine. Any other name is taken to mean one server
    everywhere, one without a dot too, as Kubernetes resolves it alike on all machines.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        path = Path(parts.path)
        return folder_id(path.parent, namespace, path.name)
    scheme = parts.scheme.replace("rediss", "redis")
    host, database = (parts.hostname or "").removesuffix("."), parts.path.strip("/") or "0"
    if _is_loopback(host):
        host = f"{_machine()}:{_network()}"
    elif host.endswith(_HOSTS_OF_CONTAINERS):
        host = f"{_machine()}:{host}"
    return _digest(namespace, scheme, host, str(parts.port or DEFAULT_PORT), database)


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host in _LOOPBACK or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified  # to which a client connects as to loopback


def _machine() -> str:
    """This machine since its last start, its containers included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def _network() -> str:
    """The network that this process sees, which containers may have of their own."""
    try:
        return str(os.stat(_NETWORK).st_ino)
    except OSError:
        return ""


def _digest(namespace: bytes, *place: str) -> bytes:
    parts = [namespace, *(part.encode() for part in place)]
    return sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()[:ID_BYTES]
