"""Where a request came from, by its connection and headers: this machine, a proxy, or a web page."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from emberkv.errors import RequestError
from emberkv.serving.errors import ForbiddenError, error_response

_HOST = r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?"
_HOST_HEADER = re.compile(_HOST)
_ORIGIN_HEADER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://" + _HOST)

_FORWARDING_HEADERS = ("cdn-loop", "forwarded", "true-client-ip", "via")
_FORWARDING_PREFIXES = ("cf-", "fastly-", "fly-", "x-")
_OWN_HEADERS = ("x-api-key", "x-session-id")
"""Headers with a prefix of ``_FORWARDING_PREFIXES`` that clients of this server send themselves."""

_PRIVATE_SUFFIXES = (".local", ".internal", ".localhost", ".home.arpa")


def host_name(headers: Headers) -> str | None:
    """The name or address in the one ``Host`` header, in lower case; None where it is missing, doubled or malformed."""
    given = headers.getlist("host")
    return _name(_HOST_HEADER.fullmatch(given[0])) if len(given) == 1 else None


def origin_name(origin: str) -> str | None:
    """The name or address in an ``Origin`` header; None for "null" and what is no web page's."""
    found = _ORIGIN_HEADER.fullmatch(origin)
    return _name(found) if found is not None and found["scheme"] in ("http", "https") else None


def _name(found: "re.Match[str] | None") -> str | None:
    if found is None or int(found["port"] or 0) > 65535:
        return None
    name = found["name"].lower()
    if not name.startswith("["):
        return name
    return name[1:-1] if _is_address(name[1:-1]) else None


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address is this machine's alone."""
    if host is None:
        return False
    if _is_address(host):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def shows_a_proxy(request: HTTPConnection) -> bool:
    """Whether a request shows that a proxy sent it on: by HTTP/1.0, which proxies speak by default and programs do not,
    or by any header about a client behind it.
    """
    names = set(request.headers.keys()) - set(_OWN_HEADERS)
    forwarded = any(name in _FORWARDING_HEADERS or name.startswith(_FORWARDING_PREFIXES) for name in names)
    return forwarded or request.scope.get("http_version", "1.1") == "1.0"


def is_from_this_machine(request: HTTPConnection) -> bool:
    """Whether a request that reached a loopback address is a local program's: no web page's, and no proxy's."""
    hosts = [host_name(request.headers), *map(origin_name, request.headers.getlist("origin"))]
    return all(map(is_loopback, hosts)) and not shows_a_proxy(request)


class SourceCheck:
    """ASGI middleware: refuses malformed Host headers with 400, and requests of foreign web pages with 403.

    A page that a browser shows can send requests to addresses that only the browser's machine can reach. Where an API
    key is needed, it has none. So origins are checked if ``keyless``: a page's must be one of ``allowed_origins`` ("*"
    for all), on this machine, or on the host that the request names, where no stranger can have that name point here.
    """

    def __init__(self, app: ASGIApp, *, keyless: bool, allowed_origins: Sequence[str] = ()) -> None:
        self._app = app
        self._keyless = keyless
        self._allowed = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(HTTPConnection(scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        response = await error_response(Request(scope), error)
        await response(scope, receive, send)

    def _refusal(self, request: HTTPConnection) -> Exception | None:
        host = host_name(request.headers)
        if host is None and not (request.scope.get("http_version") == "1.0" and "host" not in request.headers):
            return RequestError("the Host header is missing, doubled or malformed; send 'Host: NAME:PORT' once")
        for origin in request.headers.getlist("origin"):
            if self._keyless and not self._is_accepted(origin, host):
                return ForbiddenError(
                    f"pages of {origin[:200]!r} may not use this server, which asks for no key; its operator can allow "
                    "them by --cors-origin, or set an API key"
                )
        return None

    def _is_accepted(self, origin: str, host: str | None) -> bool:
        if origin in self._allowed or "*" in self._allowed:
            return True
        page = origin_name(origin)
        return is_loopback(page) or (page is not None and page == host and _cannot_be_rebound(page))


def _cannot_be_rebound(host: str) -> bool:
    """Whether no one outside the network can have made this name point to this server: DNS rebinding needs a public
    name.
    """
    return _is_address(host) or "." not in host or host.endswith(_PRIVATE_SUFFIXES)


_TABLES = ("tcp", "tcp6")
_LOCAL, _REMOTE, _UID = 1, 2, 7
"""Columns of /proc/net/tcp."""


def is_own_user(connection: HTTPConnection, folder: Path = Path("/proc/net")) -> bool:
    """Whether a connection over loopback was opened by this process's user, or by root.

    True where the system has no such list (anything but Linux); False where the list lacks the connection.
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
