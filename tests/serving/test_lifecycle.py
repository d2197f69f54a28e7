"""Readiness and draining, over a real server where it matters."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Semaphore
from typing import Any

import httpx
import pytest

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, OutputListener, TokenOutput
from emberkv.serving.app import create_app
from emberkv.serving.errors import TooManyRequestsError
from emberkv.serving.lifecycle import Lifecycle, ServedModel, ServerPhase
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client, serving
from tests.waiting import DEADLINE, eventually

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
MESSAGE = {**CHAT, "max_tokens": 50}


def status_of(ready: httpx.Response) -> dict[str, Any]:
    """/ready's answer but for warmup and background work, which have tests of their own."""
    return {name: value for name, value in ready.json().items() if name not in ("warmup", "background")}


def test_before_the_model_is_loaded(model: ServedModel) -> None:
    lifecycle = Lifecycle()
    client = Client(create_app(lifecycle))
    assert client.get("/health").json() == {"status": "alive"}
    ready = client.get("/ready")
    assert ready.status_code == 503
    assert status_of(ready) == {"ready": False, "status": "loading", "detail": "the model is being loaded"}
    refused = client.post("/v1/chat/completions", CHAT)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "not_ready"
    assert client.post("/v1/messages", MESSAGE).json()["error"] == {
        "type": "overloaded_error",
        "message": "the server cannot answer yet: the model is being loaded",
    }
    assert client.get("/v1/models").status_code == 503

    lifecycle.loaded(model)
    ready = client.get("/ready")
    assert ready.status_code == 200
    assert status_of(ready) == {"ready": True, "status": "ready", "detail": "serving tiny"}
    assert client.post("/v1/chat/completions", CHAT).status_code == 200


def test_a_model_that_cannot_be_loaded() -> None:
    lifecycle = Lifecycle()
    lifecycle.failed("model.safetensors is corrupt")
    ready = Client(create_app(lifecycle)).get("/ready")
    assert ready.status_code == 503
    assert status_of(ready) == {"ready": False, "status": "failed", "detail": "model.safetensors is corrupt"}


def test_a_model_loaded_during_a_drain_is_not_served(model: ServedModel) -> None:
    lifecycle = Lifecycle()
    lifecycle.phase = ServerPhase.DRAINING
    lifecycle.loaded(model)
    assert lifecycle.phase is ServerPhase.DRAINING


def test_a_drain_refuses_new_answers_and_lets_running_ones_finish(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=2)
    with (
        serving(lifecycle, drain_seconds=60) as server,
        httpx.Client(base_url=server.url, timeout=DEADLINE) as client,
        ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=CHAT, timeout=DEADLINE)
        eventually(lambda: engine.running == 1)
        server.stop()
        eventually(lambda: lifecycle.phase is ServerPhase.DRAINING)
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server takes no new requests: the server is shutting down"
        assert client.get("/ready").json()["status"] == "draining"
        assert client.post("/v1/messages/count_tokens", json=CHAT).status_code == 200
        engine.resume()
        assert running.result().json()["choices"][0]["message"]["content"] == "Hello"
    assert engine.aborted == []


def test_what_a_drain_cannot_wait_for_ends_properly(lifecycle: Lifecycle, engine: FakeEngine) -> None:
    engine.script = Script("Hello", pause_after=2)
    begun = Semaphore(0)
    with serving(lifecycle, drain_seconds=0) as server, ThreadPoolExecutor() as pool:

        def ask(path: str, body: dict[str, Any]) -> httpx.Response:
            with httpx.stream("POST", server.url + path, json=body, timeout=DEADLINE) as response:
                begun.release()
                response.read()
            return response

        requests = {
            "stream": ("/v1/chat/completions", {**CHAT, "stream": True}),
            "whole": ("/v1/chat/completions", CHAT),
            "events": ("/v1/messages", {**MESSAGE, "stream": True}),
        }
        running = {name: pool.submit(ask, path, body) for name, (path, body) in requests.items()}
        eventually(lambda: engine.running == 3)
        for _ in ("stream", "events"):
            assert begun.acquire(timeout=DEADLINE)
        server.stop()
        responses = {name: future.result() for name, future in running.items()}
    message = "the server shut down before the answer was finished"
    *_, last_event, done = responses["stream"].text.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(last_event.removeprefix("data: "))["error"]["message"] == message
    assert responses["whole"].status_code == 503
    assert responses["whole"].json()["error"]["message"] == message
    assert responses["events"].text.endswith(
        'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"' + message + '"}}\n\n'
    )
    eventually(lambda: engine.running == 0)
    assert len(engine.aborted) == 3


def test_health_tells_when_the_engine_has_stopped(lifecycle: Lifecycle, client: Client) -> None:
    assert client.get("/health").status_code == 200
    lifecycle.failed("the engine stopped: ValueError")
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"status": "failed", "detail": "the engine stopped: ValueError"}


def test_the_tokenizers_memory_is_a_metric(client: Client) -> None:
    assert "emberkv_tokenizer_cache_bytes 0.0" in client.get("/metrics").text


def test_a_model_whose_workers_come_and_go(lifecycle: Lifecycle, client: Client) -> None:
    lifecycle.has_workers(False)
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    assert client.post("/v1/chat/completions", CHAT).status_code == 503
    lifecycle.has_workers(True)
    assert client.get("/ready").status_code == 200
    assert client.post("/v1/chat/completions", CHAT).status_code == 200
    lifecycle.failed("broken")
    lifecycle.has_workers(True)
    assert client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_refused_after_it_was_taken_has_the_refusals_status(model: ServedModel, stream: bool) -> None:
    class Full(FakeEngine):
        def submit(self, request: GenerationRequest, listener: OutputListener) -> None:
            refusal = TooManyRequestsError("full", retry_after=2.3)
            listener(TokenOutput(request.request_id, finish_reason=FinishReason.ERROR, error="full", refusal=refusal))

    lifecycle = Lifecycle()
    lifecycle.loaded(replace(model, engine=Full()))
    client = Client(create_app(lifecycle))
    refused = client.post("/v1/chat/completions", {**CHAT, "stream": stream})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    assert refused.json()["error"]["code"] == "too_many_requests"
    claude = client.post("/v1/messages", {**MESSAGE, "stream": stream})
    assert (claude.status_code, claude.headers["retry-after"]) == (529, "3")
    assert claude.json()["error"]["type"] == "overloaded_error"
