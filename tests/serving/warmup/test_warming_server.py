"""A server that is still warming: what /ready and /metrics tell, and that it answers all the same."""

from collections.abc import Iterator

import pytest

from emberkv.serving.app import create_app
from emberkv.serving.lifecycle import Lifecycle, ServedModel, ServerPhase
from emberkv.serving.warmup.warmup import Warmup, WarmupOptions
from tests.serving.harness import MODEL, Client
from tests.serving.test_request_metrics import samples
from tests.serving.warmup.test_warmup import ONE, TWO, FakePool

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def lifecycle(model: ServedModel, pool: FakePool) -> Iterator[Lifecycle]:
    """Warming, with a warmup that is not started."""
    lifecycle = Lifecycle()
    settings = WarmupOptions(required=True, timeout=10.0)
    warmup = Warmup(pool, settings, [ONE, TWO], on_ready=lifecycle.warmed, clock=pool.clock)
    lifecycle.loaded(ServedModel(model.names, model.created, model.engine, model.tokenizer, warmup), warming=True)
    yield lifecycle
    warmup.close()


def warmup_of(lifecycle: Lifecycle) -> Warmup:
    warmup = lifecycle.model().warmup
    assert warmup is not None
    return warmup


def test_not_ready_but_answering(lifecycle: Lifecycle, client: Client) -> None:
    assert lifecycle.phase is ServerPhase.WARMING
    ready = client.get("/ready")
    assert ready.status_code == 503
    assert ready.json() == {
        "background": {},
        "ready": False,
        "status": "warming",
        "detail": "the model is loaded; prompts are being warmed",
        "warmup": {
            "phase": "running",
            "required": True,
            "prompts": 2,
            "warm_prompts": 0,
            "tokens": 0,
            "problems": [],
            "learned": 0,
            "restored": 0,
            "computed_tokens": 0,
            "seconds": 0.0,
            "timeouts": 0,
        },
    }
    assert client.get("/health").status_code == 200
    assert client.post("/v1/chat/completions", CHAT).status_code == 200


def test_ready_once_it_is_warm(lifecycle: Lifecycle, client: Client, pool: FakePool) -> None:
    pool.seconds = 8.0
    warmup_of(lifecycle).tick()
    assert client.get("/ready").status_code == 200
    body = client.get("/ready").json()
    assert (body["ready"], body["status"], body["detail"]) == (True, "ready", "serving tiny")
    assert (body["warmup"]["warm_prompts"], body["warmup"]["tokens"]) == (2, 16)


def test_what_is_not_warm_is_told(lifecycle: Lifecycle, client: Client, pool: FakePool) -> None:
    pool.seconds = 12.0
    warmup_of(lifecycle).tick()
    body = client.get("/ready").json()
    assert (body["ready"], body["status"]) == (False, "warming")
    assert body["warmup"]["problems"] == ["prompt 2: the time was up before it began"]
    assert body["warmup"]["timeouts"] == 1


def test_a_drain_is_not_ended_by_the_warmup(lifecycle: Lifecycle) -> None:
    lifecycle.phase = ServerPhase.DRAINING
    warmup_of(lifecycle).tick()
    assert lifecycle.phase is ServerPhase.DRAINING


def test_metrics(lifecycle: Lifecycle, client: Client, pool: FakePool) -> None:
    pool.seconds = 12.0
    warmup_of(lifecycle).tick()
    found = {name: value for name, value in samples(client).items() if name.startswith("emberkv_warmup")}
    assert found == {
        "emberkv_warmup_prompts warm": 1,
        "emberkv_warmup_prompts cold": 1,
        "emberkv_warmup_phase waiting": 0,
        "emberkv_warmup_phase off": 0,
        "emberkv_warmup_phase running": 1,
        "emberkv_warmup_phase done": 0,
        "emberkv_warmup_phase timed_out": 0,
        "emberkv_warmup_phase failed": 0,
        "emberkv_warmup_cached_tokens": 8,
        "emberkv_warmup_restored_prompts": 0,
        "emberkv_warmup_seconds_total": 12.0,
        "emberkv_warmup_tokens_total": 8,
        "emberkv_warmup_timeouts_total": 1,
    }


def test_a_server_without_a_warmup(model: ServedModel) -> None:
    lifecycle = Lifecycle()
    client = Client(create_app(lifecycle))
    assert client.get("/ready").json()["warmup"]["phase"] == "waiting"
    lifecycle.loaded(model)
    assert client.get("/ready").json()["warmup"]["phase"] == "off"
