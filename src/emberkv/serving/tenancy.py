"""Tenants: the file that names them, their API keys and the operator's, and the salts that keep their blocks apart."""

import hmac
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, ByteSize, Field, SecretStr, ValidationError, model_validator

from emberkv.config import ServeConfig, Size, usable_key
from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
from emberkv.files import drafted, open_own_file, remove_leftovers
from emberkv.serving.admission import RateLimits
from emberkv.validation import Strict, describe
from emberkv.yaml_files import read_yaml

KEY_TENANT_PREFIX = "key-"
"""Begins the names of tenants that are made of ``--api-key``."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


def _tenant_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name == PUBLIC_OWNER or name.startswith(KEY_TENANT_PREFIX):
        raise ValueError(
            "a tenant's name has 1 to 64 of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, "
            f"and is neither {PUBLIC_OWNER!r} nor begins with {KEY_TENANT_PREFIX!r}"
        )
    return name


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise ValueError("it must be the key's SHA-256 in 64 hexadecimal digits")
    return text.lower()


class KeySource(Strict):
    """One API key, which is not written into the file: its SHA-256, or the environment variable that holds it."""

    sha256: Annotated[str, AfterValidator(_digest)] | None = None
    env: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.sha256 is None) == (self.env is None):
            raise ValueError("a key is given as {sha256: DIGEST} or as {env: VARIABLE}")
        return self

    def digest(self, environ: Mapping[str, str]) -> bytes:
        """The key's SHA-256. Raises ConfigError for a variable that is not set, or empty."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        assert self.env is not None
        key = environ.get(self.env, "")
        if not key:
            raise ConfigError(f"the environment variable {self.env}, which is to hold a key, is not set")
        return key_digest(key)


class TierShare(Strict):
    """floor: bytes that others leave to the owner. quota: bytes that it may have; without one, all there are."""

    floor: Size = ByteSize(0)
    quota: Size | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.quota is not None and self.quota < self.floor:
            raise ValueError(f"the quota, {self.quota} bytes, is below the floor, {self.floor}")
        return self

    def share(self) -> Share:
        return Share(int(self.floor), None if self.quota is None else int(self.quota))


class Shares(Strict):
    """An owner's share of the pool and of each kind of tier: the names of `tiers.kinds.SHARED_OUT`."""

    pool: TierShare = TierShare()
    ram: TierShare = TierShare()
    shm: TierShare = TierShare()
    disk: TierShare = TierShare()
    remote: TierShare = TierShare()


class LimitsEntry(Strict):
    """A tenant's limits; without one, it may use as much as there is. See `RateLimits`."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)

    def limits(self) -> RateLimits:
        return RateLimits(self.requests_per_minute, self.tokens_per_minute, self.concurrency)


class TenantEntry(Shares):
    """weight: the tenant's part of the engine's time while others want it too, beside the weights of the others.
    limits: of its rates and its concurrency.
    """

    keys: list[KeySource] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    limits: LimitsEntry = LimitsEntry()


class PublicPrompt(Strict):
    """A beginning that all tenants share. system: a system prompt, rendered as the model's chat template does.
    text: as it stands, as completions send it. The file variants name a file, from the tenants file's folder on.
    """

    system: str | None = Field(default=None, min_length=1)
    system_file: str | None = Field(default=None, min_length=1)
    text: str | None = Field(default=None, min_length=1)
    text_file: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("a public prefix is given as one of system, system_file, text and text_file")
        return self


class TenantsFile(Strict):
    """tenants: by name. public: the share of what is cached of public prefixes."""

    tenants: dict[Annotated[str, AfterValidator(_tenant_name)], TenantEntry] = Field(default_factory=dict)
    public: Shares = Shares()
    public_prefixes: list[PublicPrompt] = Field(default_factory=list)

    def shares(self, tier: str) -> dict[str, Share]:
        """Each owner's share of one of `tiers.kinds.SHARED_OUT`."""
        owners: dict[str, Shares] = {**self.tenants, PUBLIC_OWNER: self.public}
        return {owner: getattr(shares, tier).share() for owner, shares in owners.items()}


def key_digest(key: str) -> bytes:
    """SHA-256 of a key's UTF-8 bytes."""
    return sha256(key.encode()).digest()


def read_tenants(path: Path) -> TenantsFile:
    """Read a tenants file, and the prompts' files that it names into ``system`` and ``text``.

    Raises ConfigError that names the file and each key at fault.
    """
    name = f"the tenants file {path}"
    data = read_yaml(path, ConfigError, name=name)
    try:
        found = TenantsFile.model_validate({} if data is None else data)
    except ValidationError as error:  # an entry of keys is not repeated, as it may be the key itself
        about_keys = any("keys" in detail["loc"] for detail in error.errors(include_url=False))
        hint = "; a key is given as {sha256: DIGEST} or as {env: VARIABLE}" if about_keys else ""
        raise ConfigError(f"{name}: {describe(error, hidden=('keys',))}{hint}") from error
    prompts = [_with_text(prompt, path.parent) for prompt in found.public_prefixes]
    return found.model_copy(update={"public_prefixes": prompts})


def _with_text(prompt: PublicPrompt, folder: Path) -> PublicPrompt:
    (source,) = prompt.model_fields_set
    if not source.endswith("_file"):
        return prompt
    path = folder / getattr(prompt, source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"the public prefix {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the public prefix {path} is not UTF-8 at byte {error.start}") from error
    if not text:
        raise ConfigError(f"the public prefix {path} is empty")
    return PublicPrompt.model_validate({source.removesuffix("_file"): text})


_MOST_BYTES = 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerKeys:
    """api: each a tenant of its own. admin, metrics, cluster: None where none is set."""

    api: tuple[str, ...]
    admin: str | None
    metrics: str | None
    cluster: str | None = None


def server_keys(config: ServeConfig) -> ServerKeys:
    """The keys that are given themselves or by files. Raises ConfigError for a file that holds none, or not one."""
    files = () if config.api_key_file is None else read_keys("--api-key-file", config.api_key_file)
    return ServerKeys(
        api=(*(key.get_secret_value() for key in config.api_keys), *files),
        admin=one_key("--admin-key-file", config.admin_key, config.admin_key_file),
        metrics=one_key("--metrics-key-file", config.metrics_key, config.metrics_key_file),
        cluster=one_key("--cluster-secret-file", config.cluster_secret, config.cluster_secret_file),
    )


def read_keys(option: str, path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; blank lines are passed over. Warns of a file that other users may read.

    option: what names the file, as typed. Raises ConfigError for a file that cannot be read or holds no key, and for a
    line that is no usable key.
    """
    try:
        with path.open("rb") as file:
            open_to = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{option} {path} has more than {_MOST_BYTES:,} bytes; it must hold one key a line")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is not UTF-8 at byte {error.start}; it must hold one key a line") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                keys.append(usable_key(line.strip()))
            except ValueError as error:
                raise ConfigError(f"{option} {path}, line {number}: {error}") from error
    if not keys:
        raise ConfigError(f"{option} {path} holds no key; write one key a line, or leave the option out")
    if open_to:
        _log.warning("the keys in %s are open to other users; the file should be readable by its owner only", path)
    return tuple(keys)


def one_key(option: str, given: SecretStr | None, path: Path | None) -> str | None:
    """The key that is given, or that a file holds, which ``option`` names. Raises ConfigError for another file."""
    if path is None:
        return None if given is None else given.get_secret_value()
    keys = read_keys(option, path)
    if len(keys) > 1:
        raise ConfigError(f"{option} {path} holds {len(keys)} keys; it must hold one")
    return keys[0]


SECRET_BYTES = 32
SECRET_FILE = "secret"  # noqa: S105 - a file's name


def server_secret(given: str | None, cache_dir: Path | None) -> bytes:
    """What was ``given``, else what the file ``secret`` in ``cache_dir`` holds, which is made where there is none.

    Without a folder, and with a warning in one that cannot be written, it is random: what tenants have cached on disk
    is found again by no later process. Raises ConfigError for a file that does not hold a secret, and
    UntrustedPathError for one that another user may have written.
    """
    if given is not None:
        return given.encode()
    if cache_dir is None:
        return os.urandom(SECRET_BYTES)
    path = cache_dir / SECRET_FILE
    remove_leftovers(cache_dir, re.escape(SECRET_FILE))
    try:
        return _read(path) if os.path.lexists(path) else _create(path)
    except OSError as error:
        _log.warning("no secret can be kept as %s (%s); tenants' cached blocks end with this run", path, error.strerror)
        return os.urandom(SECRET_BYTES)


def _read(path: Path) -> bytes:
    with os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as file:
        others = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        secret = file.read(SECRET_BYTES + 1)
    if others:
        _log.warning("the secret %s is open to other users; it should be readable by its owner only", path)
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path} is no secret: it must hold {SECRET_BYTES} bytes; delete it to have a new one made")
    return secret


def _create(path: Path) -> bytes:
    """Write a whole file first and then give it its name, unless another process was sooner: then read that one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = os.urandom(SECRET_BYTES)
    with drafted(path, secret) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            return _read(path)
    return secret


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


DEFAULT_TENANT = Tenant("", b"")
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
            return DEFAULT_TENANT
        tenant = self._tenants.get(name)
        if tenant is None:
            known = ", ".join(map(repr, self._tenants)) or "only '', the tenant of all requests"
            raise UnknownTenantError(f"tenant {name!r} is unknown; this server has {known}")
        return tenant

    @property
    def weights(self) -> dict[str, float]:
        """The parts in which tenants share the engine's time; a tenant that is not here has 1."""
        return {name: entry.weight for name, entry in self._file.tenants.items()}

    @property
    def rate_limits(self) -> dict[str, RateLimits]:
        """By the names of tenants; one that is not here has none."""
        return {name: entry.limits.limits() for name, entry in self._file.tenants.items()}

    @property
    def all_weights(self) -> dict[str, float]:
        """As `weights`, of every tenant."""
        return {**dict.fromkeys(self._tenants, 1.0), **self.weights}

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
