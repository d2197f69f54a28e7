"""API keys: who asks, and the salt that keeps one key's cache blocks from another's."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from emberkv.serving.failures import UnauthorizedError


class ApiKeys:
    """The keys that may use the API. Without keys, everyone may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def salt_of(self, headers: Mapping[str, str]) -> bytes:
        """The asking key's salt; empty when no keys are set.

        The key comes as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``. Raises UnauthorizedError.
        """
        if not self._keys:
            return b""
        given = _given_key(headers)
        if given is None:
            raise UnauthorizedError("no API key was given; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        # every key is compared, in constant time, so that timing tells nothing
        matches = [key for key in self._keys if hmac.compare_digest(key, given)]
        if not matches:
            raise UnauthorizedError("the API key given is not one of this server's keys")
        return hashlib.sha256(b"emberkv tenant\0" + matches[0]).digest()


def _given_key(headers: Mapping[str, str]) -> bytes | None:
    # servers read headers as latin-1; encoding them back gives the bytes that were sent
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip().encode("latin-1")
    key = headers.get("x-api-key")
    return key.encode("latin-1") if key else None
