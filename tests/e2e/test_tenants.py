"""Two tenants of a real server, over a restart: each finds its own and the public prefix, and no more."""

import stat
from collections.abc import Mapping
from pathlib import Path

import httpx

from emberkv.serving.tenancy import key_digest
from tests.conftest import CheckpointFactory
from tests.e2e.process import Server, serving
from tests.waiting import DEADLINE

KEYS = {"acme": "acme-key", "globex": "globex-key"}
SYSTEM = "You are careful. " + "The lamps along the street are lit at six and go out at dawn. " * 12
PRIVATE = "She counted them: " + "one, two, three, and then no more. " * 20


def tenants_file(folder: Path) -> Path:
    lines = ["tenants:"]
    for name, key in KEYS.items():
        lines += [f"  {name}:", f"    keys: [{{sha256: {key_digest(key).hex()}}}]", "    pool: {floor: 1MiB}"]
    lines += ["public_prefixes:", f"  - system: {SYSTEM!r}"]
    path = folder / "tenants.yaml"
    path.write_text("\n".join(lines))
    return path


def ask(server: Server, tenant: str) -> Mapping[str, int]:
    """The usage of one long prompt, always the same."""
    response = httpx.post(
        f"{server.url}/v1/messages",
        headers={"x-api-key": KEYS[tenant]},
        json={
            "model": "emberkv-test",
            "max_tokens": 4,
            "system": SYSTEM,
            "messages": [{"role": "user", "content": PRIVATE}],
        },
        timeout=DEADLINE,
    )
    assert response.status_code == 200, response.text
    usage: Mapping[str, int] = response.json()["usage"]
    return usage


def test_tenants_over_a_restart(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = ["--tenants", str(tenants_file(tmp_path)), "--cache-dir", str(cache), "--cache-ram", "24MiB"]
    flags += ["--served-name", "emberkv-test", "--no-warmup", "--admin-key", "admin-key"]
    model = str(checkpoint("llama"))
    with serving(tmp_path, model, *flags) as server:
        cold = ask(server, "acme")
        public = ask(server, "globex")["cache_read_input_tokens"]
        own = ask(server, "globex")["cache_read_input_tokens"]
        assert cold["cache_read_input_tokens"] == 0
        assert 0 < public < own
        assert httpx.post(f"{server.url}/v1/messages", json={}, timeout=DEADLINE).status_code == 401
        exposition = httpx.get(
            f"{server.url}/metrics/tenants", headers={"x-api-key": "admin-key"}, timeout=DEADLINE
        ).text
        assert f'emberkv_tenant_hit_tokens_total{{tenant="globex"}} {float(public + own)}' in exposition
    assert stat.S_IMODE((cache / "secret").stat().st_mode) == 0o600
    with serving(tmp_path, model, *flags) as server:
        # nothing is measured yet, so the first load is not weighed against computing; only full blocks are on disk
        assert ask(server, "acme")["cache_read_input_tokens"] == own // 16 * 16
    (cache / "secret").unlink()
    with serving(tmp_path, model, *flags) as server:
        assert ask(server, "acme")["cache_read_input_tokens"] == public
