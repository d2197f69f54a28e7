"""Two gateways side by side over two workers: sessions, tenants' limits and shares are those of the whole cluster."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from emberkv.serving.tenancy import key_digest
from tests.conftest import CheckpointFactory
from tests.e2e.cluster_process import TEXT, Cluster, cluster_in
from tests.e2e.process import Server
from tests.waiting import DEADLINE, eventually

KIB = 1024
POOL_QUOTA = 384 * KIB
TENANTS = f"""
tenants:
  acme:
    keys: [{{sha256: {key_digest("acme").hex()}}}]
    pool: {{quota: {POOL_QUOTA}}}
  globex:
    keys: [{{sha256: {key_digest("globex").hex()}}}]
  initech:
    keys: [{{sha256: {key_digest("initech").hex()}}}]
    limits: {{tokens_per_minute: 2}}
"""
FLOOD = 32
"""Prompts of one tenant at once. The two workers compute four of them at a time."""

ADMIN = {"x-api-key": "admin-key"}


@pytest.fixture(scope="module")
def both(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, list[Server]]]:
    """A cluster, and its gateways."""
    folder = tmp_path_factory.mktemp("both")
    tenants = folder / "tenants.yaml"
    tenants.write_text(TENANTS)
    keys = ("--tenants", str(tenants), "--admin-key", "admin-key")
    with cluster_in(folder, checkpoint("llama"), {"EMBERKV_SECRET": "by which tenants' blocks are named"}) as it:
        for name in "ab":
            it.start_worker(name, *keys, "--max-running", "2")
        settings = {"tenants": str(tenants), "admin_key": "admin-key", "gateway_count": "2"}
        gateways = [it.start_gateway("a", "b", called=name, **settings) for name in ("left", "right")]
        for gateway in gateways:
            eventually(lambda: statuses(gateway) == {"a": "up", "b": "up"})  # noqa: B023 - it is called at once
        yield it, gateways


def statuses(gateway: Server) -> dict[str, str]:
    listed = httpx.get(f"{gateway.url}/v1/cluster", headers=ADMIN, timeout=DEADLINE).json()["workers"]
    return {each["worker_id"]: each["status"] for each in listed}


def completion(prompt: str | Sequence[str], tokens: int) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def ask(gateway: Server, tenant: str, prompt: str, tokens: int = 1, session: str = "") -> httpx.Response:
    headers = {"x-api-key": tenant, **({"x-session-id": session} if session else {})}
    return httpx.post(
        f"{gateway.url}/v1/completions", json=completion(prompt, tokens), headers=headers, timeout=DEADLINE
    )


def worker_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return dict(each.split("=") for each in answer.headers["x-emberkv-route"].split(";"))["worker"]


def test_a_session_goes_on_at_its_worker_through_either_gateway(both: tuple[Cluster, list[Server]]) -> None:
    _, gateways = both
    prompt, usage, worker = f"A session of two gateways. {TEXT}", {}, ""

    def knows(gateway: Server, tokens: int) -> bool:
        """Whether the gateway knows from the worker's events what the session has cached."""
        question = {"openai": {"model": "tiny", "prompt": prompt}, "tenant": "globex"}
        found = httpx.post(f"{gateway.url}/v1/cache/explain", json=question, headers=ADMIN, timeout=DEADLINE).json()
        return any(each["worker"] == worker and each["hit_tokens"] >= tokens for each in found["workers"])

    for turn in range(4):
        gateway = gateways[turn % 2]
        if usage:
            eventually(lambda: knows(gateway, usage["prompt_tokens"] // 16 * 16))  # noqa: B023 - it is called at once
        answer = ask(gateway, "globex", prompt, session="s")
        if usage:
            assert worker_of(answer) == worker
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= usage["prompt_tokens"]
        worker, usage = worker_of(answer), answer.json()["usage"]
        prompt += f" And turn {turn} goes on."


def test_a_tenants_limit_is_of_both_together(both: tuple[Cluster, list[Server]]) -> None:
    _, gateways = both
    assert [ask(each, "initech", TEXT).status_code for each in gateways] == [200, 200]
    for gateway in gateways:
        refused = ask(gateway, "initech", TEXT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_tenants_quota_holds_whichever_gateway_its_requests_come_by(both: tuple[Cluster, list[Server]]) -> None:
    cluster, gateways = both
    for number in range(12):
        assert ask(gateways[number % 2], "acme", f"number {number}: {TEXT}").status_code == 200
    held = []
    for worker in cluster.workers.values():
        pool = httpx.get(f"{worker.url}/metrics/tenants", headers=ADMIN, timeout=DEADLINE).text
        held += [line.split()[-1] for line in pool.splitlines() if 'tenant="acme"' in line and 'tier="pool"' in line]
    assert held  # all may be at the worker that was measured as the faster one
    assert max(map(float, held)) <= POOL_QUOTA


def test_a_tenant_is_not_kept_waiting_by_anothers_flood_through_the_other_gateway(
    both: tuple[Cluster, list[Server]],
) -> None:
    cluster, (left, right) = both
    tried = 0

    def is_served_before_most() -> bool:
        """False where part of the flood had ended before the request was sent, as this process was held up."""
        nonlocal tried
        tried += 1
        ended: list[str] = []
        with ThreadPoolExecutor(1) as thread:
            flood = thread.submit(stream, left, "acme", [f"flood {tried} {number}" for number in range(FLOOD)], ended)
            eventually(lambda: sum(map(in_flight, cluster.workers.values())) >= FLOOD - 4 or flood.done())
            before = len(ended)
            answer = ask(right, "globex", f"between {tried}", tokens=2)
            meanwhile = len(ended) - before
            assert answer.status_code == 200
            flood.result(DEADLINE)
        assert len(ended) == FLOOD
        if before > 4:
            return False
        assert meanwhile <= FLOOD // 2  # in the order of arrival, it would be more than two thirds
        return True

    eventually(is_served_before_most)


def stream(gateway: Server, tenant: str, prompts: Sequence[str], ended: list[str]) -> None:
    """Send prompts as one request. ended: gets the last line of each answer as it comes."""
    body = {**completion(prompts, tokens=150), "stream": True}
    url, headers = f"{gateway.url}/v1/completions", {"x-api-key": tenant}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=DEADLINE) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if '"finish_reason":"length"' in line:
                ended.append(line)


def in_flight(worker: Server) -> float:
    """Requests that the worker computes, or that wait there."""
    samples = dict(line.rsplit(" ", 1) for line in worker.metrics_text().splitlines() if not line.startswith("#"))
    return sum(float(samples[f"emberkv_requests_{state}"]) for state in ("running", "waiting"))
