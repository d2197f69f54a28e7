"""``--request-timeout``: an answer that takes longer ends with its API's error, and its request leaves the engine."""

from dataclasses import replace
from typing import Any

import httpx
import pytest

from emberkv.serving.app import ServingSettings
from emberkv.serving.event_stream import StreamTimes
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, serving, sse_blocks
from tests.waiting import DEADLINE, eventually

USER = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": USER, "n": 2},
    "/v1/completions": {"model": MODEL, "prompt": "a"},
    "/v1/messages": {"model": MODEL, "messages": USER, "max_tokens": 10},
}
ENDLESS = ServingSettings(request_timeout=0.05)
PATIENT = ServingSettings(request_timeout=3600)


def error_name(path: str) -> str:
    return "timeout_error" if path == "/v1/messages" else "request_timeout"


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_becomes_a_504(lifecycle: Lifecycle, engine: FakeEngine, path: str) -> None:
    engine.script = Script("Hello", pause_after=3)
    with serving(lifecycle, ENDLESS) as server:
        response = httpx.post(server.url + path, json=BODIES[path], timeout=DEADLINE)
        eventually(lambda: engine.running == 0)
    assert response.status_code == 504
    assert error_name(path) in response.text
    assert "not finished 0.05 s after its request" in response.text


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_has_not_begun_becomes_a_504(lifecycle: Lifecycle, engine: FakeEngine, path: str) -> None:
    engine.script = Script("Hello", pause_after=0)
    engine.is_full = True
    with serving(lifecycle, ENDLESS) as server:
        response = httpx.post(server.url + path, json={**BODIES[path], "stream": True}, timeout=DEADLINE)
        eventually(lambda: engine.running == 0)
    assert response.status_code == 504
    assert error_name(path) in response.text
    assert lifecycle.running == 0


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_ends_with_an_error(lifecycle: Lifecycle, engine: FakeEngine, path: str) -> None:
    engine.script = Script("Hello", pause_after=3)
    early = StreamTimes(headers=0.0, admission_check=0.0)
    responses: list[httpx.Response] = []
    with serving(lifecycle, replace(ENDLESS, stream_times=early)) as server:

        def begins() -> bool:
            """False where the time has passed before the headers were sent."""
            responses.append(httpx.post(server.url + path, json={**BODIES[path], "stream": True}, timeout=DEADLINE))
            return responses[-1].status_code == 200

        eventually(begins)
        eventually(lambda: engine.running == 0)
    assert error_name(path) in sse_blocks(responses[-1])[-1 if path == "/v1/messages" else -2]
    assert lifecycle.running == 0


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_in_time_is_whole(lifecycle: Lifecycle, path: str) -> None:
    with serving(lifecycle, PATIENT) as server:
        response = httpx.post(server.url + path, json=BODIES[path], timeout=DEADLINE)
    assert response.status_code == 200
    assert "Hello the" in response.text
