"""Tenants: which key is whose, and salts that only the server can derive."""

from pathlib import Path

import pytest

from emberkv.config import ServeConfig
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
from emberkv.serving.tenancy import (
    DEFAULT_TENANT,
    Tenants,
    TenantsFile,
    UnknownTenantError,
    declare_tenants,
    key_digest,
)

FILE = TenantsFile.model_validate(
    {
        "tenants": {
            "acme": {"keys": [{"sha256": key_digest("one").hex()}, {"env": "ACME_KEY"}], "pool": {"floor": "2KiB"}},
            "globex": {"keys": [{"sha256": key_digest("three").hex()}]},
        },
        "public": {"pool": {"quota": 9}},
    }
)
ENVIRON = {"ACME_KEY": "two"}


def test_keys_of_one_tenant_share_a_salt_and_tenants_do_not() -> None:
    tenants = Tenants(["plain"], FILE, secret=b"server", environ=ENVIRON)
    one, two, three, plain = (tenants.by_key[key_digest(key)] for key in ("one", "two", "three", "plain"))
    assert one == two == tenants.named("acme")
    assert three == tenants.named("globex")
    assert plain.name == "key-" + key_digest("plain").hex()[:12]
    assert len({one.salt, three.salt, plain.salt}) == 3
    assert all(len(tenant.salt) == 32 for tenant in (one, three, plain))


def test_a_salt_is_the_hmac_of_the_name_under_the_secret() -> None:
    salt = Tenants(["plain"], FILE, secret=b"server", environ=ENVIRON).named("acme").salt
    # printf 'emberkv tenant\0acme' | openssl dgst -sha256 -hmac server
    assert salt.hex() == "ed2b9dafba8d9cd40cdc4575ff1cc0f5034397a2458db4eb860c008d85e1026e"
    assert Tenants([], FILE, secret=b"server", environ=ENVIRON).named("acme").salt == salt
    assert Tenants([], FILE, secret=b"another", environ=ENVIRON).named("acme").salt != salt


def test_shares_of_all_owners() -> None:
    tenants = Tenants(["plain"], FILE, secret=b"", environ=ENVIRON)
    assert tenants.names == ["key-" + key_digest("plain").hex()[:12], "acme", "globex"]
    assert tenants.shares("pool") == {
        tenants.names[0]: Share(),
        "acme": Share(2048),
        "globex": Share(),
        "public": Share(0, 9),
    }
    assert tenants.shares("disk")["acme"] == Share()


def test_without_keys_everybody_is_one() -> None:
    tenants = Tenants(secret=b"")
    assert tenants.named("") is DEFAULT_TENANT
    assert tenants.by_key == {}
    assert tenants.shares("pool") == {}


def test_an_unknown_name_is_an_error() -> None:
    tenants = Tenants([], FILE, secret=b"", environ=ENVIRON)
    with pytest.raises(UnknownTenantError, match="'initech' is unknown; this server has 'acme', 'globex'"):
        tenants.named("initech")
    with pytest.raises(UnknownTenantError, match="'' is unknown"):
        tenants.named("")


def test_a_key_belongs_to_one_tenant() -> None:
    with pytest.raises(ConfigError, match="tenant 'globex': a key of this tenant is also one of 'acme'"):
        Tenants([], FILE, secret=b"", environ={"ACME_KEY": "three"})
    with pytest.raises(ConfigError, match="tenant 'acme': a key of this tenant is also one of 'key-"):
        Tenants(["one"], FILE, secret=b"", environ=ENVIRON)


def test_a_key_given_twice_is_one() -> None:
    assert len(Tenants(["plain", "plain"], secret=b"").names) == 1


@pytest.mark.parametrize("environ", [{}, {"ACME_KEY": ""}])
def test_a_variable_that_is_not_set(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"tenant 'acme': the environment variable ACME_KEY, .* is not set"):
        Tenants([], FILE, secret=b"", environ=environ)


def test_the_configuration_declares_them(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants: {acme: {keys: [{env: ACME_KEY}]}}\npublic_prefixes: [{text: Hello}]")
    config = ServeConfig.model_validate({"tenants": path, "secret": "s" * 16})
    tenants = declare_tenants(config, ("plain",), ENVIRON)
    assert tenants.names[1] == "acme"
    assert [prompt.text for prompt in tenants.public_prefixes] == ["Hello"]
    assert declare_tenants(config, ("plain",), ENVIRON).named("acme") == tenants.named("acme")


def test_the_secret_stays_beside_the_cache_between_starts(tmp_path: Path) -> None:
    config = ServeConfig(cache_dir=tmp_path / "cache")
    first, second = (declare_tenants(config, ("plain",), {}).by_key for _ in range(2))
    assert first == second
    assert (tmp_path / "cache" / "secret").is_file()
    without = ServeConfig()
    assert declare_tenants(without, ("plain",), {}).by_key != declare_tenants(without, ("plain",), {}).by_key


def test_without_tenants_no_secret_is_made(tmp_path: Path) -> None:
    declare_tenants(ServeConfig(cache_dir=tmp_path / "cache"), (), {})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "# no tenants yet", "public_prefixes: [{text: Hello}]", "tenants: {}"])
def test_a_file_without_tenants_opens_no_server(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"tenants\.yaml names no tenant, so that the server would ask for no key"):
        declare_tenants(ServeConfig(tenants=path), (), {})
    assert len(declare_tenants(ServeConfig(tenants=path), ("plain",), {}).by_key) == 1
