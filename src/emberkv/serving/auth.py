"""Which requests are let in: where they come from, the tenant of their API key, and the operator's keys."""

import hmac
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from emberkv.errors import ConfigError, RequestError
from emberkv.serving.errors import ForbiddenError, UnauthorizedError, error_response
from emberkv.serving.tenancy import DEFAULT_TENANT, Tenant, Tenants

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


class ApiKeys:
    """The keys that may use the API. Without keys, every request may."""

    def __init__(self, tenants: Tenants) -> None:
        self._by_key = tenants.by_key

    async def tenant(self, request: Request) -> Tenant:
        """`tenant_of` the request's headers, as a route's dependency."""
        return self.tenant_of(request.headers)

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant whose key the headers have; `DEFAULT_TENANT` where no keys are set.

        The key comes as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``. Raises UnauthorizedError.
        """
        if not self._by_key:
            return DEFAULT_TENANT
        given = given_key(headers)
        if given is None:
            raise UnauthorizedError("no API key was given; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        digest_given = sha256(given).digest()
        # every key is compared, in constant time, so that timing gives no hint
        matches = [tenant for digest, tenant in self._by_key.items() if hmac.compare_digest(digest, digest_given)]
        if not matches:
            raise UnauthorizedError("the API key given is not one of this server's keys")
        return matches[0]


def given_key(headers: Mapping[str, str]) -> bytes | None:
    """The key that a request brings, if any."""
    # servers read headers as latin-1; encoding them back gives the bytes that were sent
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    key = headers.get("x-api-key")
    return key.encode("latin-1") if key else None


def check_cluster_secret(headers: Mapping[str, str], secret: str | None) -> None:
    """Raises UnauthorizedError for a request that does not bring the cluster's secret; None: nothing is let in."""
    given = given_key(headers)
    if given is None or secret is None or not hmac.compare_digest(given, secret.encode()):
        raise UnauthorizedError("this route needs the cluster's secret, as 'Authorization: Bearer SECRET'")


IsOwnUser = Callable[[HTTPConnection], bool]
"""Whether a connection from this machine was opened by the user that runs the server, or by root."""


class AdminGuard:
    """Decides which requests are the operator's.

    With an admin key, those that have it. Without one, and without API keys, those of any program on this machine, if
    the server is ``bound_to_loopback``: see `is_from_this_machine` and ``is_own_user``. Otherwise there is no operator.
    metrics_key: opens the metrics, as the admin key does. Raises ConfigError for a key that is empty or opens something
    else, too.
    """

    def __init__(
        self,
        admin_key: str | None,
        *,
        metrics_key: str | None = None,
        bound_to_loopback: bool,
        tenants: Tenants,
        keys: ApiKeys,
        is_own_user: IsOwnUser = lambda _: True,
    ) -> None:
        self._admin = _digest("--admin-key", admin_key, tenants)
        self._metrics = _digest("--metrics-key", metrics_key, tenants)
        if self._metrics is not None and self._metrics == self._admin:
            raise ConfigError("--metrics-key is also the admin key; give it a key of its own, or none at all")
        self._keyless = not tenants.by_key
        self._on_loopback = bound_to_loopback
        self._keys = keys
        self._is_own_user = is_own_user

    async def operator(self, request: Request) -> None:
        """Accepts the operator's requests. Raises UnauthorizedError, or ForbiddenError where no key would open this."""
        if self._admin is not None:
            if not _matches(request, self._admin):
                raise UnauthorizedError("this needs the admin key; send it as 'Authorization: Bearer KEY'")
        elif not self._keyless or not self._on_loopback:
            raise ForbiddenError("this needs an admin key, and the server has none; start it with --admin-key-file")
        elif not (is_from_this_machine(request) and self._is_own_user(request)):
            raise ForbiddenError(
                "without an admin key, this is open only to programs that the server's user runs on this machine; "
                "start the server with --admin-key-file to use it from elsewhere"
            )

    async def asker(self, request: Request) -> Tenant | None:
        """The tenant of a request about its own prompts; None for the operator. Raises as `operator` does."""
        if self._keyless or (self._admin is not None and _matches(request, self._admin)):
            await self.operator(request)
            return None
        return self._keys.tenant_of(request.headers)

    async def metrics(self, request: Request) -> None:
        """Accepts requests that may read the metrics: all on a server without API keys and metrics key, else those with
        the metrics key or the admin key. Raises UnauthorizedError, or ForbiddenError where no key would open this.
        """
        if self._keyless and self._metrics is None:
            return
        accepted = [key for key in (self._admin, self._metrics) if key is not None]
        if any(_matches(request, key) for key in accepted):
            return
        if not accepted:
            raise ForbiddenError("this needs a metrics key, and the server has none; start it with --metrics-key-file")
        raise UnauthorizedError("this needs the metrics key or the admin key; send it as 'Authorization: Bearer KEY'")


def _digest(option: str, key: str | None, tenants: Tenants) -> bytes | None:
    if key is None:
        return None
    if not key:
        raise ConfigError(f"{option} is empty; give a key, or none at all")
    digest = sha256(key.encode()).digest()
    if digest in tenants.by_key:
        raise ConfigError(f"{option} is also an API key; it must be a key of its own")
    return digest


def _matches(request: Request, digest: bytes) -> bool:
    given = given_key(request.headers)
    return given is not None and hmac.compare_digest(digest, sha256(given).digest())
