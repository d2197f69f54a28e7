"""Tenants, by API key, each with a salt that keeps its cached blocks from the others."""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from emberkv.config import ServeConfig
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
from emberkv.serving.tenancy.keys import server_secret
from emberkv.serving.tenancy.tenants_file import KEY_TENANT_PREFIX, PublicPrompt, TenantsFile, key_digest, read_tenants


@dataclass(frozen=True, slots=True)
class Tenant:
    """name: owns what its requests cache. salt: enters its blocks' hashes where public ones end."""

    name: str
    salt: bytes

    def salted(self, cache_salt: str | None) -> "Tenant":
        """The tenant with a further salt beneath its own, from a request's ``cache_salt``; None leaves it as it is."""
        if cache_salt is None:
            return self
        return replace(self, salt=hmac.digest(self.salt, b"emberkv cache_salt\0" + cache_salt.encode(), "sha256"))


EVERYBODY = Tenant("", b"")
"""The tenant of all requests to a server without keys."""


class UnknownTenantError(ConfigError):
    """A name that is no tenant's of this server."""


class Tenants:
    """All tenants of a server, by name and by key. Without any, all requests are of one tenant, and no key is needed.

    api_keys: each key its own tenant, named by a digest. file: further tenants. environ: holds the keys that the file
    names by variable. secret: salts are derived with it, so that a tenant's name or key is not enough to compute its
    block hashes. Raises ConfigError for a key that two tenants have, or a variable that is not set.
    """

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        file: TenantsFile | None = None,
        *,
        secret: bytes,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._secret = secret
        self._file = file if file is not None else TenantsFile()
        self._names: dict[bytes, str] = {}
        for key in dict.fromkeys(api_keys):
            digest = key_digest(key)
            self._add(digest, f"{KEY_TENANT_PREFIX}{digest.hex()[:12]}")
        for name, entry in self._file.tenants.items():
            for source in entry.keys:
                try:
                    self._add(source.digest(environ or {}), name)
                except ConfigError as error:
                    raise ConfigError(f"tenant {name!r}: {error}") from error
        self._tenants = {name: Tenant(name, self._salt(name)) for name in self._names.values()}
        self.by_key = {digest: self._tenants[name] for digest, name in self._names.items()}
        """By the SHA-256 of their keys."""

    def _add(self, digest: bytes, name: str) -> None:
        other = self._names.setdefault(digest, name)
        if other != name:
            raise ConfigError(f"a key of this tenant is also one of {other!r}; it can be of one tenant only")

    def _salt(self, name: str) -> bytes:
        return hmac.digest(self._secret, b"emberkv tenant\0" + name.encode(), "sha256")

    @property
    def names(self) -> list[str]:
        return list(self._tenants)

    @property
    def public_prefixes(self) -> list[PublicPrompt]:
        return self._file.public_prefixes

    def named(self, name: str) -> Tenant:
        """Raises UnknownTenantError, a ConfigError, for a name that is no tenant's."""
        if not self._tenants and not name:
            return EVERYBODY
        tenant = self._tenants.get(name)
        if tenant is None:
            known = ", ".join(map(repr, self._tenants)) or "only '', which is everybody"
            raise UnknownTenantError(f"tenant {name!r} is unknown; this server has {known}")
        return tenant

    @property
    def weights(self) -> dict[str, float]:
        """The parts in which tenants share the engine's time; a tenant that is not here has 1."""
        return {name: entry.weight for name, entry in self._file.tenants.items()}

    def shares(self, tier: str) -> dict[str, Share]:
        """Each owner's share of one of `tiers.kinds.SHARED_OUT`, public blocks included; empty without tenants."""
        if not self._tenants:
            return {}
        return {**dict.fromkeys(self._tenants, Share()), **self._file.shares(tier)}


def declare_tenants(config: ServeConfig, api_keys: Sequence[str], environ: Mapping[str, str]) -> Tenants:
    """The tenants of the configuration's file, and one for each of ``api_keys``. Raises ConfigError for what of these
    cannot be.
    """
    file = read_tenants(config.tenants) if config.tenants is not None else TenantsFile()
    if not (api_keys or file.tenants):
        if config.tenants is not None:
            raise ConfigError(
                f"the tenants file {config.tenants} names no tenant, so that the server would ask for no key; "
                "name one, or give an API key"
            )
        return Tenants(file=file, secret=b"")  # there are no tenants to keep apart
    given = config.secret.get_secret_value() if config.secret is not None else None
    return Tenants(api_keys, file, secret=server_secret(given, config.cache_dir), environ=environ)
