"""A gateway over servers that speak the OpenAI API only: what is forwarded, and to which of them."""

import asyncio
import json
from pathlib import Path

import pytest
import zmq.asyncio

from emberkv.cluster.foreign.prompts import PieceTokenizer, PromptReader
from emberkv.cluster.foreign.worker import APPROXIMATE, ForeignSpec
from emberkv.errors import ConfigError
from emberkv.serving.api.responses_schema import signed_reasoning
from emberkv.serving.app import ServingSettings
from emberkv.serving.canonical import load_rules
from emberkv.serving.tenancy import Tenants
from tests.cluster.fake_openai import TOKENS, FakeOpenAI
from tests.cluster.foreign_gateway import CHAT, TEXT, chat, served
from tests.cluster.test_kv_events import ArrayRemoved, Publisher, stored
from tests.waiting import on_a_loop, until


@on_a_loop
async def test_a_request_and_its_answer_pass_as_they_are() -> None:
    async with served(FakeOpenAI()) as it:
        sent = json.dumps(chat(tools=[{"type": "function", "function": {"name": "f"}}], odd_field={"a": 1}), indent=3)
        answer = await it.client.post(CHAT, content=sent, headers={"content-type": "application/json", "x-title": "t"})
        ((body, headers),) = it.servers[0].requests
        assert body == sent.encode()
        assert headers["x-title"] == "t"
        assert answer.json()["choices"][0]["message"]["tool_calls"] == [{"id": "c", "odd": [1, None]}]
        assert answer.headers["x-of-the-worker"] == "yes"
        assert answer.headers["x-emberkv-route"].startswith("worker=a;why=")


@on_a_loop
async def test_an_answer_that_is_compressed_unasked_is_still_read() -> None:
    async with served(FakeOpenAI(compresses=True, cached=64)) as it:
        answer = await it.ask(chat(), **{"accept-encoding": "identity"})
        assert "content-encoding" not in answer.headers
        assert answer.json()["choices"][0]["message"]["content"] == "".join(TOKENS)
        assert answer.headers["x-emberkv-cache"].startswith("hit=64;")


@on_a_loop
async def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    async with served(FakeOpenAI()) as it:
        answer = await it.client.post(CHAT, content=b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
        assert answer.status_code == 400, answer.text
        assert it.asked() == [0]


@on_a_loop
async def test_an_error_of_the_worker_is_the_clients() -> None:
    async with served(FakeOpenAI(status=400)) as it:
        answer = await it.ask(chat())
        assert (answer.status_code, answer.json()) == (400, {"error": {"message": "no"}})
        assert it.fleet.workers[0].lost == 0


@on_a_loop
async def test_an_equal_beginning_goes_to_the_same_worker_and_the_answer_says_what_was_cached() -> None:
    async with served(FakeOpenAI(), FakeOpenAI()) as it:
        for server in it.servers:
            server.cached = 80
        answers = [await it.ask(chat(f"Question {number}?")) for number in range(6)]
        assert sorted(it.asked()) == [0, 6]
        assert answers[-1].headers["x-emberkv-cache"].startswith("hit=80;pool=80;miss=20;")
        route = dict(pair.split("=") for pair in answers[-1].headers["x-emberkv-route"].split(";"))
        assert int(route["pool"]) >= len(TEXT) // 4 // 16 * 16
        (worker,) = [each for each in it.fleet.workers if each.requests]
        assert worker.index == APPROXIMATE
        assert len(worker.running) == 0


@on_a_loop
async def test_a_worker_that_says_it_has_lost_the_prompt_is_believed() -> None:
    async with served(FakeOpenAI(cached=90)) as it:
        await it.ask(chat("An earlier conversation, of which much is forgotten. " * 40))
        before = it.fleet.workers[0].as_json()["assumed_blocks"]
        await it.ask(chat("One."))
        it.servers[0].cached = 0
        await it.ask(chat("Two."))
        after = it.fleet.workers[0].as_json()["assumed_blocks"]
        assert before > after >= len(TEXT) // 64


@on_a_loop
async def test_a_server_without_health_is_asked_for_its_models() -> None:
    async with served(FakeOpenAI(), FakeOpenAI(models=("m", "n"))) as it:
        it.servers[1].health = 404
        assert [card["id"] for card in (await it.client.get("/v1/models")).json()["data"]] == ["m", "n"]
        it.servers[1].models = ("m", "k")
        await until(lambda: "k" in it.fleet.models)
        assert (await it.ask(chat() | {"model": "k"})).status_code == 200
        assert it.asked() == [0, 1]
        unknown = await it.ask(chat() | {"model": "other"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert (await it.client.get("/v1/models/k")).json()["id"] == "k"
        assert (await it.client.get("/v1/models/other")).status_code == 404
        assert (await it.client.get("/ready")).json()["ready"]
        assert (await it.client.post("/tokenize", json=chat())).status_code == 404


@on_a_loop
async def test_a_session_stays_where_it_is() -> None:
    async with served(FakeOpenAI(), FakeOpenAI()) as it:
        for number in range(5):
            await it.ask({"model": "m", "prompt": f"{number} short"}, "/v1/completions", **{"x-session-id": "s"})
        assert sorted(it.asked()) == [0, 5]
        listed = (await it.client.get("/v1/cache/sessions")).json()["data"]
        assert [(each["session"], each["requests"], each["prompt_tokens"]) for each in listed] == [("s", 5, 500)]


@on_a_loop
async def test_explain_says_where_a_prompt_leaves_the_last_one_that_hit() -> None:
    async with served(FakeOpenAI(), FakeOpenAI()) as it:
        await it.ask(chat("Prefer simple functions. " * 20))
        changed = chat("Prefer simple functions. " * 10 + "Avoid clever functions. " * 10)
        found = (await it.client.post("/v1/cache/explain", json={"openai": changed})).json()
        assert found["unit"] == "four bytes of text"
        assert found["index"] == APPROXIMATE
        assert "diverged" in [miss["reason"] for miss in found["misses"]]
        assert found["divergence"]["expected"].lstrip().startswith("Prefer")
        assert "Avoid" in found["divergence"]["found"]
        assert found["worker"] == next(each.worker_id for each in it.fleet.workers if each.requests)
        response = {"model": changed["model"], "input": changed["messages"]}
        assert (await it.client.post("/v1/cache/explain", json={"openai": response})).json() == found
        by_id = (await it.client.post("/v1/cache/explain", json={"response_id": "cmpl-fake"})).json()
        assert (by_id["hit_tokens"], by_id["misses"][0]["reason"]) == (0, "new")


@on_a_loop
async def test_a_response_with_reasoning_signed_for_the_tenant_is_explained_with_it() -> None:
    tenants = Tenants(("one",), secret=b"secret")
    (name,) = tenants.names
    thought = signed_reasoning("The lamps are lit at dusk. " * 10, tenants.named(name).salt)
    asked = {
        "model": "m",
        "input": [
            {"role": "user", "content": "Which are lit?"},
            {"type": "reasoning", "summary": [], "encrypted_content": thought},
            {"role": "assistant", "content": TEXT},
            {"role": "user", "content": "Since when?"},
        ],
    }
    app = ServingSettings(bound_to_loopback=True, tenants=tenants)
    async with served(FakeOpenAI(), app=app) as it:
        key = {"x-api-key": "one"}
        assert (await it.ask(asked, "/v1/responses", **key)).status_code == 200
        found = (await it.client.post("/v1/cache/explain", json={"openai": asked}, headers=key)).json()
        assert found["hit_tokens"] == (found["prompt_tokens"] - 1) // 16 * 16, "all whole blocks but the last token"


@on_a_loop
async def test_a_worker_that_publishes_its_events_is_known_exactly() -> None:
    tokenizer = PieceTokenizer()
    reader = PromptReader(tokenizer=tokenizer, model="m", block_size=16)
    prompt = chat()["messages"]
    tokens = tokenizer.encode(tokenizer.render_chat(prompt), add_special_tokens=False).tolist()
    tokens = tokens[: len(tokens) // 32 * 32]
    with zmq.asyncio.Context() as context:
        publisher = Publisher(context)
        names = list(range(len(tokens) // 32))
        await publisher.publish(stored(names, None, tokens, size=32))
        events = f",kv-events={publisher.endpoint},kv-replay={publisher.replay_endpoint}"
        async with served(FakeOpenAI(), settings=events, reader=reader) as it:
            (worker,) = it.fleet.workers
            await until(lambda: worker.index == "exact")
            answer = await it.ask(chat())
            assert f"pool={len(tokens)}" in answer.headers["x-emberkv-route"]
            await publisher.publish(ArrayRemoved(names[1:], "GPU"))
            found = (await it.client.post("/v1/cache/explain", json={"openai": chat()})).json()
            while found["hit_tokens"] != 32:
                await asyncio.sleep(0.01)
                found = (await it.client.post("/v1/cache/explain", json={"openai": chat()})).json()
            assert (found["unit"], found["misses"][0]["reason"]) == ("tokens", "evicted")
        await publisher.close()


@on_a_loop
async def test_canonical_rules_change_what_is_sent(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("lines:\n  - {name: date, match: 'Today is *', action: drop}\n")
    async with served(FakeOpenAI(), app=ServingSettings(canonical=load_rules(rules), bound_to_loopback=True)) as it:
        body = chat("Hello", odd=[1])
        body["messages"][0]["content"] = f"Today is Monday\n{TEXT}"
        await it.ask(body)
        sent = json.loads(it.servers[0].requests[0][0])
        assert sent["messages"][0]["content"] == TEXT
        assert sent["odd"] == [1]


@on_a_loop
async def test_emberkv_workers_and_foreign_ones_are_known_together() -> None:
    async with served(FakeOpenAI()) as it:
        (worker,) = (await it.client.get("/v1/cluster")).json()["workers"]
        assert (worker["worker_id"], worker["status"], worker["index"]) == ("a", "up", APPROXIMATE)
        assert worker["foreign"]["models"] == ["m"]
        metrics = (await it.client.get("/metrics")).text
        assert 'emberkv_worker_foreign{worker="a"} 1.0' in metrics
        assert 'emberkv_worker_index_exact{worker="a"} 0.0' in metrics


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("127.0.0.1:8000", "begin with a URL"),
        ("http://h:1,kv-event=tcp://h:2", "'kv-event=tcp://h:2' is no setting"),
        ("http://h:1,kv-events=h:2", "use an endpoint"),
        ("http://h:1,kv-replay=tcp://h:2", "needs kv-events"),
        ("http://user:hidden@h:1", "http://...@h:1: .* api-key-file=FILE"),
        ("http://h:99999", "[Pp]ort out of range"),
        ("http://h:1,tokens=0", "from 1 to"),
        ("http://h:1,ttl=never", "number of seconds"),
    ],
)
def test_a_worker_that_is_named_wrongly_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ForeignSpec.parse(text)
