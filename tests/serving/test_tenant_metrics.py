"""/metrics/tenants: usage by tenant, for the operator only."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emberkv.engine.request import EngineStats
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.tenancy import Tenants, TenantsFile, key_digest
from emberkv.tiers.stats import TierStats
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client

PATH = "/metrics/tenants"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
ADMIN = {"authorization": "Bearer admin-key"}


@pytest.fixture
def guarded(lifecycle: Lifecycle) -> Client:
    entries = {name: {"keys": [{"sha256": key_digest(f"{name}-key").hex()}]} for name in ("acme", "globex")}
    tenants = Tenants([], TenantsFile.model_validate({"tenants": entries}), secret=b"server")
    return Client(create_app(lifecycle, ServingSettings(tenants=tenants, admin_key="admin-key")))


def ask(client: Client, tenant: str, **more: object) -> None:
    response = client.post("/v1/chat/completions", {**CHAT, **more}, headers={"authorization": f"Bearer {tenant}-key"})
    assert response.status_code == 200


def samples(client: Client) -> dict[str, float]:
    response = client.get(PATH, headers=ADMIN)
    assert response.status_code == 200
    return {
        " ".join([sample.name, *sorted(sample.labels.values())]): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_requests_and_tokens_by_tenant(guarded: Client, engine: FakeEngine) -> None:
    engine.script = Script(cached=4)
    ask(guarded, "acme")
    ask(guarded, "acme", n=2)
    ask(guarded, "globex")
    tokens = len(engine.submitted[0].prompt_token_ids)
    assert samples(guarded) == {
        "emberkv_tenant_requests_total acme": 2,
        "emberkv_tenant_requests_total globex": 1,
        "emberkv_tenant_prompt_tokens_total acme": 3 * tokens,
        "emberkv_tenant_prompt_tokens_total globex": tokens,
        "emberkv_tenant_hit_tokens_total acme": 12,
        "emberkv_tenant_hit_tokens_total globex": 4,
    }


def test_bytes_by_tier_and_tenant(guarded: Client, engine: FakeEngine) -> None:
    engine.engine_stats = EngineStats(
        pool_bytes_by_owner={"acme": 100, "public": 30},
        tiers={"ram": TierStats(bytes_by_owner={"acme": 7}), "disk": TierStats(bytes_by_owner={"globex": 9})},
    )
    assert samples(guarded) == {
        "emberkv_tenant_bytes acme pool": 100,
        "emberkv_tenant_bytes pool public": 30,
        "emberkv_tenant_bytes acme ram": 7,
        "emberkv_tenant_bytes disk globex": 9,
    }


def test_tenants_cannot_read_it_and_the_plain_metrics_name_none(guarded: Client) -> None:
    ask(guarded, "acme")
    assert guarded.get(PATH).status_code == 401
    assert guarded.get(PATH, headers={"authorization": "Bearer globex-key"}).status_code == 401
    assert "acme" not in (plain := guarded.get("/metrics", headers={"authorization": "Bearer admin-key"})).text
    assert "emberkv_requests_finished_total" in plain.text
