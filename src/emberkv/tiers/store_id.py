"""Which store a tier is: ids that are equal in all processes that find the same blocks in it.

An id is a digest of the namespace of the blocks and of what distinguishes their store from others. A Redis server keeps
a key of its own for that, so that its names do not matter. A folder is known by its place on this machine, and the
master of a Mooncake store, which keeps no key, by its address: two names of one master give two ids, and one name must
not mean two masters. Names that each machine resolves to itself, as localhost, have one id a machine.
"""

import os
import platform
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

ID_BYTES = 16

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


def kept_id(key: bytes, namespace: bytes) -> bytes:
    """Of a store that keeps ``key``, which was drawn for it at random."""
    return _digest(namespace, "kept", key.hex())


def master_id(url: str, namespace: bytes) -> bytes:
    """Of the store whose master is at ``SCHEME://HOST:PORT``.

    All names of loopback are one server, which each network of a machine's containers has for itself. The names by
    which containers reach their host are a server of this machine. Any other name is taken to mean one server
    everywhere, one without a dot too, as Kubernetes resolves it alike on all machines.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").removesuffix(".")
    if _is_loopback(host):
        host = f"{_machine()}:{_network()}"
    elif host.endswith(_HOSTS_OF_CONTAINERS):
        host = f"{_machine()}:{host}"
    return _digest(namespace, "master", host, str(parts.port))


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
