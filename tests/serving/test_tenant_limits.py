"""Tenants' limits of rate and concurrency, by a clock that the tests set."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.serving.admission import RateLimits, TenantLimits
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.errors import RateLimitedError
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.tenancy import KeySource, LimitsEntry, TenantEntry, Tenants, TenantsFile, key_digest
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, serving
from tests.waiting import DEADLINE, eventually

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
ACME, GLOBEX = {"x-api-key": "acme-key"}, {"x-api-key": "globex-key"}


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tenants(**limits: int) -> Tenants:
    """acme with these limits, globex without any."""
    entries = {
        name: TenantEntry(keys=[KeySource(sha256=key_digest(f"{name}-key").hex())], limits=LimitsEntry(**entry))
        for name, entry in (("acme", limits), ("globex", {}))
    }
    return Tenants(file=TenantsFile(tenants=entries), secret=b"a secret of this test")


@given(
    per_minute=st.integers(1, 100),
    gaps=st.lists(st.floats(0, 30, allow_nan=False), max_size=200),
    count=st.integers(1, 3),
)
def test_requests_of_any_pace_stay_within_the_rate(per_minute: int, gaps: list[float], count: int) -> None:
    clock = Clock()
    limits = TenantLimits({"acme": RateLimits(requests_per_minute=per_minute).part(count)}, clock)
    accepted = 0
    for gap in gaps:
        clock.now += gap
        with suppress(RateLimitedError):
            limits.enter("acme")
            limits.leave("acme")
            accepted += 1
    rate = per_minute / count
    assert accepted <= max(1.0, rate) + clock.now * rate / 60 + 1e-6


def test_a_refused_request_is_accepted_after_the_seconds_that_it_was_given() -> None:
    clock = Clock()
    limits = TenantLimits({"acme": RateLimits(tokens_per_minute=60)}, clock)
    limits.enter("acme")
    limits.count("acme", 100)
    with pytest.raises(RateLimitedError, match="60 tokens per minute") as refused:
        limits.enter("acme")
    assert (refused.value.kind, refused.value.retry_after) == ("tokens", 41.0)
    clock.now = 40.9
    with pytest.raises(RateLimitedError):
        limits.enter("acme")
    clock.now = 41.1
    limits.enter("acme")


def test_each_api_words_a_limit_as_its_clients_know_it(lifecycle: Lifecycle) -> None:
    clock = Clock()
    app = create_app(
        lifecycle, ServingSettings(tenants=tenants(requests_per_minute=2), admin_key="admin-key"), clock=clock
    )
    client = Client(app)
    assert client.post("/v1/messages", BODY, headers=ACME).status_code == 200
    assert client.post("/v1/messages", BODY, headers=ACME).status_code == 200
    claude = client.post("/v1/messages", BODY, headers=ACME)
    gpt = client.post("/v1/chat/completions", BODY, headers=ACME)
    assert (claude.status_code, claude.json()["error"]["type"]) == (429, "rate_limit_error")
    assert (gpt.status_code, gpt.json()["error"]["type"], gpt.json()["error"]["code"]) == (
        429, "requests", "rate_limit_exceeded",
    )  # fmt: skip
    assert claude.headers["retry-after"] == gpt.headers["retry-after"] == "30"
    assert client.post("/v1/messages", BODY, headers=GLOBEX).status_code == 200
    clock.now = 30.0
    assert client.post("/v1/messages", BODY, headers=ACME).status_code == 200
    metrics = client.get("/metrics/tenants", headers={"x-api-key": "admin-key"}).text
    assert 'emberkv_tenant_limited_requests_total{limit="requests",tenant="acme"} 2.0' in metrics


def test_prompts_and_answers_count_as_tokens(lifecycle: Lifecycle) -> None:
    clock = Clock()
    client = Client(create_app(lifecycle, ServingSettings(tenants=tenants(tokens_per_minute=1)), clock=clock))
    usage = client.post("/v1/chat/completions", BODY, headers=ACME).json()["usage"]
    assert usage["completion_tokens"] > 0
    refused = client.post("/v1/chat/completions", BODY, headers=ACME)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert refused.headers["retry-after"] == str(60 * usage["total_tokens"])


def test_a_tenant_has_so_many_answers_at_once_and_another_is_not_concerned(
    lifecycle: Lifecycle, engine: FakeEngine
) -> None:
    engine.script = Script("Hello", pause_after=0)
    with serving(lifecycle, ServingSettings(tenants=tenants(concurrency=1))) as server, ThreadPoolExecutor() as pool:
        url = f"{server.url}/v1/chat/completions"
        first = pool.submit(httpx.post, url, json=BODY, headers=ACME, timeout=DEADLINE)
        eventually(lambda: engine.running == 1)
        refused = httpx.post(url, json=BODY, headers=ACME, timeout=DEADLINE)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "1 answers at once" in refused.json()["error"]["message"]
        other = pool.submit(httpx.post, url, json=BODY, headers=GLOBEX, timeout=DEADLINE)
        eventually(lambda: engine.running == 2)
        engine.resume()
        assert (first.result().status_code, other.result().status_code) == (200, 200)
        engine.script = Script("Hello")
        assert httpx.post(url, json=BODY, headers=ACME, timeout=DEADLINE).status_code == 200


def test_a_request_that_the_server_is_too_full_for_does_not_count(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=0)
    settings = ServingSettings(tenants=tenants(requests_per_minute=2), max_requests=1)
    app = create_app(lifecycle, settings, clock=Clock())
    client = Client(app)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/v1/chat/completions", BODY, headers=ACME)
        eventually(lambda: engine.running == 1)
        refused = client.post("/v1/chat/completions", BODY, headers=ACME)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        engine.resume()
        assert first.result().status_code == 200
    engine.script = Script("Hello")
    assert client.post("/v1/chat/completions", BODY, headers=ACME).status_code == 200
