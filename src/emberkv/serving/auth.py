"""API keys and the operator's keys: which tenant sends a request, and whether the operator does."""

import hmac
from collections.abc import Callable, Mapping
from hashlib import sha256

from starlette.requests import HTTPConnection, Request

from emberkv.errors import ConfigError
from emberkv.serving.errors import ForbiddenError, UnauthorizedError
from emberkv.serving.http.request_source import is_from_this_machine
from emberkv.serving.tenancy.tenants import EVERYBODY, Tenant, Tenants


class ApiKeys:
    """The keys that may use the API. Without keys, every request may."""

    def __init__(self, tenants: Tenants) -> None:
        self._by_key = tenants.by_key

    async def tenant(self, request: Request) -> Tenant:
        """`tenant_of` the request's headers, as a route's dependency."""
        return self.tenant_of(request.headers)

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant whose key the headers have; `EVERYBODY` where no keys are set.

        The key comes as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``. Raises UnauthorizedError.
        """
        if not self._by_key:
            return EVERYBODY
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
