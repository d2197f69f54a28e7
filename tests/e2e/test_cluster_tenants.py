"""Tenants of a cluster: quotas and floors hold over two workers and in their shared tier; limits at the gateway."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from emberkv.serving.tenancy import key_digest
from tests.conftest import CheckpointFactory
from tests.e2e.cluster_process import TEXT, Cluster, cluster_in
from tests.e2e.process import Server
from tests.tiers.redis_process import RedisProcess
from tests.waiting import DEADLINE, eventually

KIB = 1024
POOL_QUOTA, REMOTE_QUOTA, REMOTE_FLOOR, REMOTE_BYTES = 384 * KIB, 512 * KIB, 512 * KIB, 768 * KIB
FLOOD = 12
"""Prompts of the tenant with the quota: several times what it may keep."""

TENANTS = f"""
tenants:
  acme:
    keys: [{{sha256: {key_digest("acme").hex()}}}]
    pool: {{quota: {POOL_QUOTA}}}
    remote: {{quota: {REMOTE_QUOTA}}}
  globex:
    keys: [{{sha256: {key_digest("globex").hex()}}}]
    remote: {{floor: {REMOTE_FLOOR}}}
  initech:
    keys: [{{sha256: {key_digest("initech").hex()}}}]
    limits: {{tokens_per_minute: 1}}
"""


@pytest.fixture
def cluster(checkpoint: CheckpointFactory, redis_server: RedisProcess, tmp_path: Path) -> Iterator[Cluster]:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(TENANTS)
    shared = ("--remote-tier", redis_server.address.url, "--remote-tier-bytes", str(REMOTE_BYTES))
    keys = ("--tenants", str(tenants), "--admin-key", "admin-key")
    with cluster_in(tmp_path, checkpoint("llama")) as it:
        for name in "ab":
            it.start_worker(name, *keys, *shared)
        it.start_gateway("a", "b", tenants=str(tenants), admin_key="admin-key")
        eventually(lambda: up(it) == {"a", "b"})
        yield it


def listed(cluster: Cluster) -> list[dict[str, object]]:
    assert cluster.gateway is not None
    response = httpx.get(f"{cluster.gateway.url}/v1/cluster", headers={"x-api-key": "admin-key"}, timeout=DEADLINE)
    workers: list[dict[str, object]] = response.json()["workers"]
    return workers


def up(cluster: Cluster) -> set[object]:
    return {worker["worker_id"] for worker in listed(cluster) if worker["status"] == "up"}


def ask(cluster: Cluster, tenant: str, start: str) -> httpx.Response:
    """A prompt of its own for each ``start``."""
    assert cluster.gateway is not None
    body = {"model": "tiny", "prompt": f"{start}: {TEXT}", "max_tokens": 1, "temperature": 0}
    return httpx.post(
        f"{cluster.gateway.url}/v1/completions", json=body, headers={"x-api-key": tenant}, timeout=DEADLINE
    )


def held(worker: Server, tier: str, tenant: str) -> float:
    """Bytes of the tenant's blocks, as the worker counts them."""
    text = httpx.get(f"{worker.url}/metrics/tenants", headers={"x-api-key": "admin-key"}, timeout=DEADLINE).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "emberkv_tenant_bytes" and sample.labels == {"tier": tier, "tenant": tenant}
    )


def test_quotas_floors_and_limits_hold_over_all_workers(cluster: Cluster) -> None:
    workers = list(cluster.workers.values())
    assert ask(cluster, "globex", "first").status_code == 200
    eventually(lambda: max(held(worker, "remote", "globex") for worker in workers) > 0)
    for worker in workers:
        eventually(lambda worker=worker: worker.is_idle() and not worker.metric("emberkv_tier_queue_bytes"))
    kept = max(held(worker, "remote", "globex") for worker in workers)
    assert kept <= REMOTE_FLOOR

    for number in range(FLOOD):
        assert ask(cluster, "acme", f"number {number}").status_code == 200
    assert all(worker["requests"] for worker in listed(cluster)), "both workers have answered"
    eventually(lambda: all(held(worker, "remote", "acme") > REMOTE_QUOTA / 2 for worker in workers))
    for worker in workers:
        assert held(worker, "pool", "acme") <= POOL_QUOTA
        assert held(worker, "remote", "acme") <= REMOTE_QUOTA
        assert held(worker, "remote", "globex") == kept

    again = ask(cluster, "globex", "first")
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    assert ask(cluster, "initech", "first").status_code == 200
    refused = ask(cluster, "initech", "second")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 60
