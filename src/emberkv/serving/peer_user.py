"""Which user opened a connection from this machine, as Linux lists it."""

import os
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from starlette.requests import HTTPConnection

_TABLES = ("tcp", "tcp6")
_LOCAL, _REMOTE, _UID = 1, 2, 7
"""Columns of /proc/net/tcp."""


def is_own_user(connection: HTTPConnection, folder: Path = Path("/proc/net")) -> bool:
    """Whether a connection over loopback was opened by this process's user, or by root.

    True where the system does not tell (anything but Linux); False where it does and does not list the connection.
    """
    if not (folder / "tcp").exists():
        return True
    client, server = connection.scope.get("client"), connection.scope.get("server")
    if client is None or server is None or server[1] is None:
        return False
    user = user_of(tuple(client), tuple(server), folder)
    return user is not None and user in (0, os.geteuid())


def user_of(client: tuple[str, int], server: tuple[str, int], folder: Path = Path("/proc/net")) -> int | None:
    """The user id that owns the ``client`` end of a connection on this machine; None where none is listed."""
    ends = {(end, other) for end, other in zip(_written(client), _written(server), strict=True)}
    for table in _TABLES:
        for columns in _rows(folder / table):
            if (columns[_LOCAL], columns[_REMOTE]) in ends:
                return int(columns[_UID])
    return None


def _rows(table: Path) -> Iterator[list[str]]:
    try:
        lines = table.read_text(encoding="ascii").splitlines()[1:]
    except FileNotFoundError:  # a system without IPv6
        return
    yield from (line.split() for line in lines)


def _written(end: tuple[str, int]) -> list[str]:
    """An address and a port as the tables have them: in hexadecimal, each 32 bits in the machine's order; an IPv4
    address also as a socket for both versions has it.
    """
    address = ip_address(end[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    forms: list[IPv4Address | IPv6Address] = [address]
    if isinstance(address, IPv4Address):
        forms.append(IPv6Address(f"::ffff:{address}"))
    return [f"{_words(form.packed)}:{end[1]:04X}" for form in forms]


def _words(packed: bytes) -> str:
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
