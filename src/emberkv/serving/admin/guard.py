"""Who may use the cache's own routes: the operator by a key of their own, or whoever is on this machine."""

import hmac
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request

from emberkv.errors import ConfigError
from emberkv.serving.api.failures import UnauthorizedError
from emberkv.serving.tenancy.auth import ApiKeys, given_key
from emberkv.serving.tenancy.tenants import Tenant, Tenants

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


class AdminGuard:
    """admin_key: None lets in whoever reaches a server that is ``bound_to_loopback``, and nobody elsewhere.

    Raises ConfigError for an admin key that is empty, or a tenant's.
    """

    def __init__(self, admin_key: str | None, *, bound_to_loopback: bool, tenants: Tenants, keys: ApiKeys) -> None:
        if admin_key is not None and not admin_key:
            raise ConfigError("admin_key is empty; give a key, or none at all")
        self._key = None if admin_key is None else sha256(admin_key.encode()).digest()
        if self._key is not None and self._key in tenants.by_key:
            raise ConfigError("admin_key is also an API key; it must be a key of its own")
        self._on_loopback = bound_to_loopback
        self._keys = keys

    async def operator(self, request: Request) -> None:
        """Lets the operator in. Raises UnauthorizedError, or HTTPException 404 where these routes do not exist."""
        if self._key is None and not self._on_loopback:
            raise HTTPException(404)
        if self._key is None:
            _check_came_from_here(request)
        elif not self._is_admin(request):
            raise UnauthorizedError("this needs the admin key; send it as 'Authorization: Bearer KEY'")

    async def asker(self, request: Request) -> Tenant | None:
        """The tenant who asks about its own prompts; None is the operator. Raises UnauthorizedError."""
        if self._is_admin(request):
            return None
        if self._key is None and self._on_loopback and given_key(request.headers) is None:
            _check_came_from_here(request)
            return None
        return self._keys.tenant_of(request.headers)

    def _is_admin(self, request: Request) -> bool:
        given = given_key(request.headers)
        return self._key is not None and given is not None and hmac.compare_digest(self._key, sha256(given).digest())


def _check_came_from_here(request: Request) -> None:
    """A web page in somebody's browser, or a proxy, can reach a loopback address too; neither is the operator."""
    origin = request.headers.get("origin")
    hosts = [request.url.hostname, *([urlsplit(origin).hostname] if origin is not None else [])]
    if not all(map(is_loopback, hosts)) or any(header in request.headers for header in _PROXY_HEADERS):
        raise UnauthorizedError("this is open without a key to programs on this machine only; set an admin key")


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address is this machine's alone."""
    if host is None:
        return False
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
