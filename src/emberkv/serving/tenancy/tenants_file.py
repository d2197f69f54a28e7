"""The tenants file: tenants and their keys, their shares of each tier, and the prefixes that all tenants share."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, ByteSize, Field, ValidationError, model_validator

from emberkv.config import Size
from emberkv.core.hashing import PUBLIC_OWNER
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
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


class TenantEntry(Shares):
    """weight: the tenant's part of the engine's time while others want it too, beside the weights of the others."""

    keys: list[KeySource] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


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
