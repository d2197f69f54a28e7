"""The routes by sequence: KV tensors, ``/generate``, ``/stats`` and the model on demand."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from emberkv.core.sequence import FinishReason
from emberkv.errors import ModelNotFoundError
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.generate_api import worker_routers
from emberkv.serving.kv_tensors import KVTensorStore, StoredLayer
from emberkv.serving.lifecycle import Lifecycle, ModelDims, ServedModel, ServerPhase
from emberkv.serving.sequence_api import answer_unknown_paths_in_detail
from emberkv.tensors import deserialize_tensor, serialize_tensor
from tests.serving.fakes import ByteTokenizer, FakeEngine, Script
from tests.serving.harness import MODEL, Client
from tests.waiting import DEADLINE

WORKER = "worker-0"
OPERATOR = {"authorization": "Bearer admin"}
LAYER = 5, 12, 64


def routed(lifecycle: Lifecycle, store: KVTensorStore | None = None, settings: ServingSettings | None = None) -> Client:
    store = store or KVTensorStore(max_bytes=2**28, max_entries=50_000)
    settings = settings or ServingSettings(admin_key="admin")
    app = create_app(lifecycle, settings, routers=worker_routers(store, WORKER))
    answer_unknown_paths_in_detail(app)
    return Client(app)


@pytest.fixture
def worker(lifecycle: Lifecycle) -> Client:
    return routed(lifecycle)


def layer(rows: int, *, dims: tuple[int, ...] = LAYER[1:], seed: int = 0) -> dict[str, Any]:
    """The k and v of a request."""
    random = torch.Generator().manual_seed(seed)
    return {name: serialize_tensor(torch.randn(rows, *dims, generator=random)) for name in ("k", "v")}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in response.text[:-2].split("\n\n")]


def test_unknown_paths_outside_v1_have_a_detail(worker: Client) -> None:
    unknown = worker.get("/nothing")
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})
    wrong_method = worker.get("/kv/put")
    assert (wrong_method.status_code, wrong_method.json()) == (405, {"detail": "Method Not Allowed"})
    assert wrong_method.headers["allow"] == "POST"
    assert worker.get("/v1/nothing").json()["error"]["message"] == "there is no /v1/nothing here"


def test_put_tensors_come_back_equal(worker: Client) -> None:
    given = layer(5)
    answer = worker.post("/kv/put", {"seq_id": "s", "layer": 3, **given})
    assert answer.json() == {
        "status": "ok",
        "seq_id": "s",
        "layer": 3,
        "seq_len": 5,
        "tensor_shapes": {"k": list(LAYER), "v": list(LAYER)},
        "tensor_dtypes": {"k": "torch.float32", "v": "torch.float32"},
        "worker_id": WORKER,
    }
    found = worker.post("/kv/get", {"seq_id": "s", "layer": 3}).json()
    assert {name: found[name] for name in found.keys() - {"k", "v"}} == {
        "seq_id": "s", "layer": 3, "seq_len": 5, "worker_id": WORKER,
    }  # fmt: skip
    for name in ("k", "v"):
        assert torch.equal(
            deserialize_tensor(found[name], library="torch"), deserialize_tensor(given[name], library="torch")
        )


def test_appends_grow_a_layer(worker: Client) -> None:
    assert worker.post("/kv/append", {"seq_id": "s", "layer": 0, **layer(5)}).json()["seq_len"] == 5
    for expected in (6, 7, 8):
        answer = worker.post("/kv/append", {"seq_id": "s", "layer": 0, **layer(1, seed=expected)}).json()
        assert (answer["seq_len"], answer["tensor_shapes"]["k"]) == (expected, [1, 12, 64])
        length = worker.get("/kv/s/0/length").json()
        assert length == {"seq_id": "s", "layer": 0, "seq_len": expected, "worker_id": WORKER}
    found = worker.post("/kv/get", {"seq_id": "s", "layer": 0, "format": "safetensors"}).json()
    assert found["k"]["format"] == "safetensors"
    assert deserialize_tensor(found["k"], library="torch").shape == (8, 12, 64)


class WatchedStore(KVTensorStore):
    """Notes the threads that use it, by what they use."""

    def __init__(self) -> None:
        super().__init__(max_bytes=2**20, max_entries=10)
        self.threads: list[tuple[str, int]] = []

    def put(self, *given: Any) -> int:
        self.threads.append(("put", threading.get_ident()))
        return super().put(*given)

    def append(self, *given: Any, **named: Any) -> int:
        self.threads.append(("append", threading.get_ident()))
        return super().append(*given, **named)

    def get(self, *given: Any) -> StoredLayer | None:
        self.threads.append(("get", threading.get_ident()))
        return super().get(*given)

    def length(self, *given: Any) -> int:
        self.threads.append(("length", threading.get_ident()))
        return super().length(*given)

    def delete(self, *given: Any) -> bool:
        self.threads.append(("delete", threading.get_ident()))
        return super().delete(*given)


def test_the_store_is_not_used_on_the_event_loop(lifecycle: Lifecycle) -> None:
    store = WatchedStore()
    worker = routed(lifecycle, store)  # its event loops run on this thread
    named = {"seq_id": "s", "layer": 0}
    for path, body in (("put", named | layer(1)), ("append", named | layer(1)), ("get", named)):
        assert worker.post(f"/kv/{path}", body).status_code == 200
    assert worker.get("/kv/s/0/length").json()["seq_len"] == 2
    assert worker.request("DELETE", "/kv/s").status_code == 200
    assert [name for name, _ in store.threads] == ["put", "length", "append", "get", "length", "delete"]
    assert threading.get_ident() not in {thread for _, thread in store.threads}


def test_layers_are_apart_and_deleted_together(worker: Client) -> None:
    for number in range(4):
        worker.post("/kv/put", {"seq_id": "s", "layer": number, **layer(10, seed=number)})
    for number in range(4):
        found = worker.post("/kv/get", {"seq_id": "s", "layer": number}).json()
        assert (found["layer"], found["seq_len"]) == (number, 10)
        expected = deserialize_tensor(layer(10, seed=number)["k"], library="torch")
        assert torch.equal(deserialize_tensor(found["k"], library="torch"), expected)
    for _ in range(2):  # also where there is nothing
        deleted = worker.request("DELETE", "/kv/s")
        assert deleted.json() == {"status": "evicted", "seq_id": "s", "worker_id": WORKER}
    assert [worker.get(f"/kv/s/{number}/length").json()["seq_len"] for number in range(4)] == [0, 0, 0, 0]


def test_bytes_are_counted_exactly(worker: Client) -> None:
    for number, rows in enumerate((5, 10, 15)):
        worker.post("/kv/put", {"seq_id": "s", "layer": number, **layer(rows, dims=(8, 64))})
    found = worker.get("/stats").json()
    exact = 2 * 30 * 8 * 64 * 4
    assert found["worker_id"] == WORKER
    assert found["kv_cache"] == {
        "entries": 3, "num_entries": 3, "max_entries": 50_000, "unique_sequences": 1, "evicted_sequences": 0,
        "device": "cpu", "total_bytes": exact, "total_mb": exact / 2**20, "max_bytes": 2**28,
    }  # fmt: skip


def test_more_entries_than_allowed_evict_whole_sequences(lifecycle: Lifecycle) -> None:
    worker = routed(lifecycle, KVTensorStore(max_bytes=2**28, max_entries=4))
    for name in ("a", "b", "c"):
        for number in range(2):
            worker.post("/kv/put", {"seq_id": name, "layer": number, **layer(1)})
    lengths = {name: [worker.get(f"/kv/{name}/{at}/length").json()["seq_len"] for at in range(2)] for name in "abc"}
    assert lengths == {"a": [0, 0], "b": [1, 1], "c": [1, 1]}


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "unknown entry": ("/kv/get", {"seq_id": "s", "layer": 0}, 404, "KV entry not found"),
    "other heads": ("/kv/append", {"seq_id": "put", "layer": 0, **layer(1, dims=(3, 64))}, 400, "rows of shape"),
    "no tensor": ("/kv/put", {"seq_id": "s", "layer": 0, "k": {}, "v": {}}, 400, "k: a tensor is an object"),
    "pickle": (
        "/kv/put",
        {"seq_id": "s", "layer": 0, "k": {"data": "gASVAA==", "shape": [1], "dtype": "torch.float32"}, "v": {}},
        400,
        "torch.save",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tensors_are_refused(worker: Client, case: str) -> None:
    path, body, status, message = REFUSED[case]
    worker.post("/kv/put", {"seq_id": "put", "layer": 0, **layer(1)})
    answer = worker.post(path, body)
    assert answer.status_code == status
    assert set(answer.json()) == {"detail"}
    assert message in answer.json()["detail"]


def test_a_body_of_another_shape_is_422_with_what_is_wrong(worker: Client) -> None:
    wrong = worker.post("/kv/put", {"seq_id": "s", "layer": "first", "k": [1], "v": {}})
    assert wrong.status_code == 422
    assert [(each["type"], each["loc"], each["input"]) for each in wrong.json()["detail"]] == [
        ("int_parsing", ["body", "layer"], "first"),
        ("dict_type", ["body", "k"], [1]),
    ]
    missing = worker.post("/kv/get", {}).json()["detail"]
    assert [(each["type"], each["loc"]) for each in missing] == [
        ("missing", ["body", "seq_id"]),
        ("missing", ["body", "layer"]),
    ]
    broken = worker.request("POST", "/kv/get", content=b"{").json()["detail"]
    assert broken[0]["type"] == "json_invalid"


def test_tenants_do_not_see_each_others_sequences(lifecycle: Lifecycle) -> None:
    worker = routed(lifecycle, settings=ServingSettings(api_keys=("one", "two")))
    assert worker.post("/kv/put", {"seq_id": "s", "layer": 0, **layer(1)}).status_code == 401
    keys = {name: {"authorization": f"Bearer {name}"} for name in ("one", "two")}
    worker.post("/kv/put", {"seq_id": "s", "layer": 0, **layer(1)}, headers=keys["one"])
    assert worker.get("/kv/s/0/length", headers=keys["one"]).json()["seq_len"] == 1
    assert worker.get("/kv/s/0/length", headers=keys["two"]).json()["seq_len"] == 0


def test_without_the_option_there_are_no_such_routes(client: Client) -> None:
    assert client.post("/kv/put", {}).status_code == 404
    assert client.post("/generate", {}).status_code == 404
    assert client.get("/health").json() == {"status": "alive"}


def test_health_names_the_worker_before_a_model_is_loaded() -> None:
    worker = routed(Lifecycle())
    assert worker.get("/health").json() == {"status": "ok", "worker_id": WORKER}
    assert worker.get("/stats").json()["model"] == {"loaded": False}
    assert worker.get("/inference/model/info").json() == {"loaded": False, "worker_id": WORKER}


def generate(worker: Client, **fields: Any) -> httpx.Response:
    return worker.post("/generate", {"seq_id": "s", "prompt": "Once", "max_tokens": 10, **fields})


def test_generation_is_a_start_tokens_and_an_end(worker: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hé", finish=FinishReason.STOP, tokens_per_step=1)
    assert events(generate(worker)) == [
        {"type": "start", "seq_id": "s", "prompt": "Once"},
        {"type": "token", "token": "H", "token_id": ord("H")},
        {"type": "token", "token": "", "token_id": 0xC3},
        {"type": "token", "token": "é", "token_id": 0xA9},
        {"type": "done", "generated_text": "OnceHé", "tokens_generated": 3},
    ]


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 100])
@pytest.mark.parametrize("limit", range(1, 9))
def test_the_tokens_texts_are_the_generated_text(
    worker: Client, engine: FakeEngine, tokens_per_step: int, limit: int
) -> None:
    engine.script = Script("aé…bc", tokens_per_step=tokens_per_step)
    start, *tokens, done = events(generate(worker, max_tokens=limit))
    ids = list("aé…bc".encode()[:limit])
    assert [each["token_id"] for each in tokens] == ids
    expected = "Once" + bytes(ids).decode(errors="replace")
    assert (start["prompt"] + "".join(each["token"] for each in tokens), done["generated_text"]) == (expected, expected)
    assert done["tokens_generated"] == limit


class EndingTokenizer(ByteTokenizer):
    @property
    def description(self) -> dict[str, Any]:
        return {**super().description, "eos_token": "\0"}


def test_the_end_of_the_text_is_a_token_without_text(engine: FakeEngine) -> None:
    lifecycle = Lifecycle()
    lifecycle.loaded(ServedModel((MODEL,), 0, engine, EndingTokenizer()))
    engine.script = Script("Hi")
    assert [(each.get("token"), each.get("token_id")) for each in events(generate(routed(lifecycle)))[1:-1]] == [
        ("H", 72), ("i", 105), ("", 0),
    ]  # fmt: skip
    assert len(events(generate(routed(lifecycle), max_tokens=1))) == 3


@pytest.mark.parametrize("count", [0, -3])
def test_no_tokens_wanted_none_computed(worker: Client, engine: FakeEngine, count: int) -> None:
    assert events(generate(worker, max_tokens=count)) == [
        {"type": "start", "seq_id": "s", "prompt": "Once"},
        {"type": "done", "generated_text": "Once", "tokens_generated": 0},
    ]
    assert engine.submitted == []


def test_temperature_0_is_greedy_and_defaults_are_those_of_the_interface(worker: Client, engine: FakeEngine) -> None:
    generate(worker, temperature=0)
    worker.post("/generate", {"seq_id": "s", "prompt": "Once"})
    greedy, default = (request.params for request in engine.submitted)
    assert greedy.is_greedy
    assert (default.max_tokens, default.temperature, default.top_p) == (50, 1.0, 1.0)
    assert [request.session_id for request in engine.submitted] == ["s", "s"]


UNUSABLE: dict[str, tuple[dict[str, Any], int, str]] = {
    "negative temperature": ({"temperature": -0.1}, 400, "temperature is -0.1"),
    "empty prompt": ({"prompt": ""}, 400, "empty"),
    "another model": ({"model_name": "gpt2"}, 404, "model is 'gpt2'"),
    "too long": ({"prompt": "x" * 10_000}, 400, "at most"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_generated_is_refused(worker: Client, case: str) -> None:
    fields, status, message = UNUSABLE[case]
    answer = generate(worker, **fields)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


def test_a_worker_is_given_the_sequences_id(worker: Client) -> None:
    answer = worker.post("/generate", {"prompt": "Once"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "seq_id"]


def test_a_failure_is_the_last_event(worker: Client, engine: FakeEngine) -> None:
    engine.script = Script("Hello", finish=FinishReason.ERROR, error="it broke")
    *_, last = events(generate(worker))
    assert last == {"type": "error", "error": "generation failed: it broke"}


def test_generated_sequences_are_counted(worker: Client) -> None:
    assert worker.get("/stats").json()["generated_sequences"] == 0
    for name in ("a", "b", "c", "a"):
        generate(worker, seq_id=name)
    assert worker.get("/stats").json()["generated_sequences"] == 3


class Host:
    """A model host whose engine is a fake one."""

    def __init__(self) -> None:
        self.lifecycle = Lifecycle()
        self.engines: list[FakeEngine] = []
        self.stopped = 0
        self.problem: Exception | None = None
        self.may_load = threading.Event()
        self.may_load.set()
        self.lifecycle.on_demand(self)

    def load(self) -> None:
        self.may_load.wait(DEADLINE)
        if self.problem is not None:
            raise self.problem
        engine = FakeEngine()
        self.engines.append(engine)
        about = {"dtype": "float32", "device": "cpu"}
        model = ServedModel((MODEL,), 0, engine, ByteTokenizer(), about=about, dims=ModelDims(2, 4, 1, 64, 2**30))
        self.lifecycle.loaded(model)

    def unload(self) -> None:
        self.engines[-1].stop()
        self.stopped += 1


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    for engine in host.engines:
        engine.stop()


def test_the_first_request_loads_the_model(host: Host) -> None:
    worker = routed(host.lifecycle)
    assert worker.get("/ready").json()["status"] == "idle"
    assert events(generate(worker))[-1]["type"] == "done"
    completion = worker.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 1})
    assert completion.status_code == 200
    assert len(host.engines) == 1


def test_a_model_that_was_unloaded_is_loaded_again(host: Host) -> None:
    worker = routed(host.lifecycle)
    facts = {
        "worker_id": WORKER,
        "model_info": {
            "model_name": MODEL, "num_layers": 2, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64,
            "device": "cpu", "dtype": "float32",
        },
        "memory_usage": {"device": "cpu", "allocated_gb": 1.0, "reserved_gb": 1.0},
    }  # fmt: skip
    for loads in (1, 1, 2):
        if loads == 2:
            assert worker.request("DELETE", "/inference/model", headers=OPERATOR).json() == {
                "status": "unloaded", "model_name": MODEL, "worker_id": WORKER,
            }  # fmt: skip
            assert worker.request("DELETE", "/inference/model", headers=OPERATOR).json()["status"] == "no_model_loaded"
            assert (host.lifecycle.phase, host.stopped) == (ServerPhase.IDLE, 1)
        assert worker.post("/inference/init", {"model_name": MODEL}).json() == {"status": "initialized", **facts}
        assert worker.get("/inference/model/info").json() == {"loaded": True, **facts}
        assert len(host.engines) == loads
    assert events(generate(worker))[-1]["type"] == "done"


def test_a_model_that_cannot_be_loaded_is_an_error_and_tried_again(host: Host) -> None:
    worker = routed(host.lifecycle)
    host.problem = ModelNotFoundError("there is no such model")
    for answer in (worker.post("/inference/init", {}), generate(worker)):
        assert answer.status_code == 500
        assert answer.json() == {"detail": "Model initialization failed: there is no such model"}
    host.problem = None
    assert events(generate(worker))[-1]["type"] == "done"


def test_another_models_name_loads_nothing(host: Host) -> None:
    answer = routed(host.lifecycle).post("/inference/init", {"model_name": "gpt2"})
    assert answer.status_code == 404


async def asked_together(app: FastAPI, ask: Callable[[httpx.AsyncClient, int], Any], count: int) -> list[Any]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=DEADLINE) as client:
        return await asyncio.gather(*(ask(client, number) for number in range(count)))


def test_requests_that_come_together_load_the_model_once(host: Host) -> None:
    def ask(client: httpx.AsyncClient, number: int) -> Any:
        if number == 3:
            host.may_load.set()
        return client.post("/generate", json={"seq_id": str(number), "prompt": "Once"})

    host.may_load.clear()
    answers = asyncio.run(asked_together(routed(host.lifecycle).app, ask, 4))
    assert [events(answer)[-1]["type"] for answer in answers] == ["done"] * 4
    assert len(host.engines) == 1


def test_the_model_of_other_servers_stays_loaded(worker: Client) -> None:
    answer = worker.request("DELETE", "/inference/model", headers=OPERATOR)
    assert answer.status_code == 400
    assert "--model-on-demand" in answer.json()["detail"]
    assert events(generate(worker))[-1]["type"] == "done"


def test_puts_that_come_together_are_all_kept(worker: Client) -> None:
    bodies = [{"seq_id": f"s{number}", "layer": 0, **layer(2, dims=(2, 4), seed=number)} for number in range(500)]

    def ask(client: httpx.AsyncClient, number: int) -> Any:
        return client.post("/kv/put", json=bodies[number])

    answers = asyncio.run(asked_together(worker.app, ask, len(bodies)))
    assert {answer.status_code for answer in answers} == {200}
    assert worker.get("/stats").json()["kv_cache"]["unique_sequences"] == 500


def test_reads_and_appends_mixed_lose_nothing(worker: Client) -> None:
    """1,000 operations, of which 7 in 10 read, over 100 sequences."""
    row: Mapping[str, Any] = layer(1, dims=(2, 4))

    def ask(client: httpx.AsyncClient, number: int) -> Any:
        name = f"s{number % 100}"
        if number % 10 < 3 or number < 100:
            return client.post("/kv/append", json={"seq_id": name, "layer": 0, **row})
        return client.get(f"/kv/{name}/0/length")

    answers = asyncio.run(asked_together(worker.app, ask, 1000))
    assert {answer.status_code for answer in answers} == {200}
    written = sum(number % 10 < 3 or number < 100 for number in range(1000))
    assert worker.get("/stats").json()["kv_cache"]["total_bytes"] == written * 2 * (2 * 4) * 4
