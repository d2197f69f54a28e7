"""More requests than the server takes: refused at once, a tenant with less than its share excepted."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from emberkv.serving.admission import ConcurrencyLimit
from emberkv.serving.app import ServingSettings
from emberkv.serving.errors import TooManyRequestsError
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, serving
from tests.waiting import DEADLINE, eventually

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def test_a_full_server_refuses_until_an_answer_has_ended(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=0)
    with serving(lifecycle, ServingSettings(max_requests=1)) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, f"{server.url}/v1/messages", json=BODY, timeout=DEADLINE)
        eventually(lambda: engine.running == 1)
        claude = httpx.post(f"{server.url}/v1/messages", json=BODY, timeout=DEADLINE)
        gpt = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
        assert (claude.status_code, claude.json()["error"]["type"]) == (529, "overloaded_error")
        assert (gpt.status_code, gpt.json()["error"]["code"]) == (429, "too_many_requests")
        assert claude.headers["retry-after"] == gpt.headers["retry-after"] == "1"
        engine.resume()
        assert first.result().status_code == 200
        engine.script = Script("Hello")
        assert httpx.post(f"{server.url}/v1/messages", json=BODY, timeout=DEADLINE).status_code == 200


def test_a_request_that_cannot_be_started_counts_no_more(lifecycle: Lifecycle) -> None:
    wrong = {"model": MODEL, "prompt": [[1], [100_000]]}
    with serving(lifecycle, ServingSettings(max_requests=2)) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/completions", json=wrong, timeout=DEADLINE).status_code == 400
        assert httpx.post(f"{server.url}/v1/messages", json=BODY, timeout=DEADLINE).status_code == 200


def test_a_tenant_with_less_than_its_share_is_served() -> None:
    limit = ConcurrencyLimit(4)
    limit.enter("loud", 4)
    with pytest.raises(TooManyRequestsError, match="4 answers are in flight"):
        limit.enter("loud", 1)
    limit.enter("quiet", 2)
    for tenant in ("quiet", "loud"):
        with pytest.raises(TooManyRequestsError):
            limit.enter(tenant, 1)
    limit.leave("loud", 4)
    limit.enter("quiet", 2)


def test_a_request_for_many_answers_is_served_when_there_are_no_others() -> None:
    limit = ConcurrencyLimit(4)
    limit.enter("a", 64)
    with pytest.raises(TooManyRequestsError):
        limit.enter("a", 1)
    limit.leave("a", 64)
    limit.enter("a", 1)
