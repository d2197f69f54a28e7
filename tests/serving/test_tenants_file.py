"""The tenants file: what it says, and how it says no."""

from pathlib import Path

import pytest

from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError
from emberkv.serving.admission import RateLimits
from emberkv.serving.tenancy import key_digest, read_tenants

EXAMPLE = Path(__file__).parents[2] / "examples" / "tenants.yaml"
DIGEST = key_digest("sesame").hex()
WHOLE = f"""
tenants:
  acme:
    keys: [{{sha256: {DIGEST.upper()}}}, {{env: ACME_KEY}}]
    pool: {{floor: 1GiB, quota: 2GiB}}
    disk: {{quota: 1000}}
    limits: {{requests_per_minute: 60, concurrency: 2}}
  globex:
    keys: [{{env: GLOBEX_KEY}}]
public:
  ram: {{floor: 1MiB}}
public_prefixes:
  - system: Be brief.
  - system_file: prompts/long.txt
  - text: "Once upon a time"
  - text_file: prompts/raw.txt
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "long.txt").write_text("Sei höflich.\n", encoding="utf-8")
    (tmp_path / "prompts" / "raw.txt").write_text("Es war einmal", encoding="utf-8")
    file = read_tenants(write(tmp_path, WHOLE))
    assert file.shares("pool") == {"acme": Share(2**30, 2**31), "globex": Share(), "public": Share()}
    assert file.shares("ram") == {"acme": Share(), "globex": Share(), "public": Share(2**20)}
    assert file.shares("disk")["acme"] == Share(0, 1000)
    limits = {name: entry.limits.limits() for name, entry in file.tenants.items()}
    assert limits == {"acme": RateLimits(60, None, 2), "globex": RateLimits()}
    assert [source.digest({"ACME_KEY": "mellon"}) for source in file.tenants["acme"].keys] == [
        key_digest("sesame"),
        key_digest("mellon"),
    ]
    assert [(prompt.system, prompt.text) for prompt in file.public_prefixes] == [
        ("Be brief.", None),
        ("Sei höflich.\n", None),
        (None, "Once upon a time"),
        (None, "Es war einmal"),
    ]


def test_the_example() -> None:
    file = read_tenants(EXAMPLE)
    assert file.shares("disk")["acme"] == Share(2**30, 10 * 2**30)
    assert len({source.digest({}) for entry in file.tenants.values() for source in entry.keys}) == 2
    assert len(file.public_prefixes) == 2


def test_an_empty_file_has_no_tenants(tmp_path: Path) -> None:
    assert read_tenants(write(tmp_path, "")).tenants == {}


KEYS = f"keys: [{{sha256: {DIGEST}}}]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tenant: {}", "unknown: tenant; accepted: tenants, public"),
        (
            f"tenants: {{acme: {{{KEYS}, pools: {{}}}}}}",
            "tenants.acme: unknown: pools; accepted: pool, ram, shm, disk, remote",
        ),
        (
            f"tenants: {{acme: {{{KEYS}, pool: {{floor: 2GB1}}}}}}",
            "tenants.acme.pool.floor '2GB1': use a size such as 4GiB",
        ),
        (
            f"tenants: {{acme: {{{KEYS}, pool: {{floor: -1}}}}}}",
            "tenants.acme.pool.floor -1: use a size such as 4GiB",
        ),
        (
            f"tenants: {{acme: {{{KEYS}, ram: {{floor: 2KiB, quota: 1KiB}}}}}}",
            "the quota, 1024 bytes, is below the floor, 2048",
        ),
        ("tenants: {acme: {}}", "tenants.acme.keys: it is required"),
        ("tenants: {acme: {keys: []}}", "tenants.acme.keys: give at least 1"),
        ("tenants: {acme: {keys: [{sha256: abc}]}}", "tenants.acme.keys.0.sha256: it must be the key's SHA-256 in 64"),
        (
            "tenants: {acme: {keys: [{}]}}",
            "tenants.acme.keys.0: a key is given as {sha256: DIGEST} or as {env: VARIABLE}",
        ),
        ("tenants: {Acme Inc: {}}", "tenants.Acme Inc 'Acme Inc': a tenant's name has 1 to 64 of a-z"),
        (f"tenants: {{public: {{{KEYS}}}}}", "tenants.public 'public': a tenant's name"),
        (f"tenants: {{key-a: {{{KEYS}}}}}", "nor begins with 'key-'"),
        (f"tenants: {{acme: {{{KEYS}}}, acme: {{{KEYS}}}}}", "'acme' is there twice"),
        (
            "public_prefixes: [{system: a, text: b}]",
            "public_prefixes.0: a public prefix",
        ),
        ("public_prefixes: [{system: ''}]", "public_prefixes.0.system ''"),
        ("public_prefixes: [{text_file: none.txt}]", "none.txt cannot be read: No such file"),
        ("public_prefixes: [{text_file: tenants.bin}]", "tenants.bin is not UTF-8 at byte 1"),
        ("public_prefixes: [{text_file: empty}]", "empty is empty"),
        ("[1, 2]", "use keys with values"),
        ("{", "is not YAML"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "tenants.bin").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError) as raised:
        read_tenants(write(tmp_path, text))
    assert complaint in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        read_tenants(tmp_path / "none.yaml")


def test_a_plain_key_by_mistake_is_not_repeated(tmp_path: Path) -> None:
    for keys in ("[sk-very-private]", "sk-very-private", "[{sha256: sk-very-private}]", "[{key: sk-very-private}]"):
        with pytest.raises(ConfigError) as raised:
            read_tenants(write(tmp_path, f"tenants: {{acme: {{keys: {keys}}}}}"))
        assert "tenants.acme.keys" in str(raised.value)
        assert "very-private" not in str(raised.value)
