"""API keys: whose a request is."""

import hmac
from collections.abc import Mapping
from hashlib import sha256

from emberkv.serving.api.failures import UnauthorizedError
from emberkv.serving.tenancy.tenants import EVERYBODY, Tenant, Tenants


class ApiKeys:
    """The keys that may use the API. Without keys, everyone may."""

    def __init__(self, tenants: Tenants) -> None:
        self._by_key = tenants.by_key

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant:
        """Whose the given key is; `EVERYBODY` where no keys are set.

        The key comes as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``. Raises UnauthorizedError.
        """
        if not self._by_key:
            return EVERYBODY
        given = given_key(headers)
        if given is None:
            raise UnauthorizedError("no API key was given; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        asked = sha256(given).digest()
        # every key is compared, in constant time, so that timing tells nothing
        matches = [tenant for digest, tenant in self._by_key.items() if hmac.compare_digest(digest, asked)]
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
