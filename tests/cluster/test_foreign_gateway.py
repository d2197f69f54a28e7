"""A gateway over servers that speak the OpenAI API only: what is forwarded, where, and what happens when one fails."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq.asyncio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.types import Message, Receive, Scope, Send

from emberkv.cluster.foreign.client import ForeignClient
from emberkv.cluster.foreign.fleet import GIVEN_UP_AFTER, ForeignFleet
from emberkv.cluster.foreign.prompts import PieceTokenizer, PromptReader
from emberkv.cluster.foreign.worker import APPROXIMATE, ForeignSpec
from emberkv.cluster.gateway import Gateway
from emberkv.cluster.worker_client import Deadlines
from emberkv.cluster.workers import WorkerStatus
from emberkv.errors import ConfigError, WorkerTimeoutError
from emberkv.serving.api.responses_schema import signed_reasoning
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.canonical import load_rules
from emberkv.serving.event_stream import StreamTimes
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.tenancy import KeySource, LimitsEntry, TenantEntry, Tenants, TenantsFile, key_digest
from emberkv.serving.trace_recorder import RecordedRequest, TraceRecorder
from emberkv.serving.tracing import RequestTracer
from tests.cluster.fake_openai import TOKENS, FakeOpenAI
from tests.cluster.fake_workers import FakeConnection, FakeWorker
from tests.cluster.test_kv_events import ArrayRemoved, Publisher, stored
from tests.waiting import DEADLINE, on_a_loop, until

TEXT = "The lamps along the street are lit at six and go out at dawn. " * 20
CHAT = "/v1/chat/completions"


def chat(question: str = "Which are lit?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
    return {"model": "m", "messages": messages, **more}


class Served:
    """A gateway over fake servers, and a client of it."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, servers: list[FakeOpenAI]) -> None:
        self.gateway = gateway
        self.client = client
        self.servers = servers

    @property
    def fleet(self) -> ForeignFleet:
        assert self.gateway.fleet is not None
        return self.gateway.fleet

    async def ask(self, body: dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    def asked(self) -> list[int]:
        """How many requests each server has got."""
        return [len(server.requests) for server in self.servers]


@asynccontextmanager
async def served(
    *servers: FakeOpenAI, settings: str = "", own: FakeWorker | None = None, app: ServingSettings | None = None,
    recorder: TraceRecorder | None = None, reader: PromptReader | None = None,
    on_send: Callable[[Message], None] = lambda _: None, **limits: int,
) -> AsyncIterator[Served]:  # fmt: skip
    """settings: of each worker, as behind its URL. own: an emberkv worker beside them. on_send: called before each
    message to a client.
    """
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.running())
        specs = [
            ForeignSpec.parse(f"{server.url},id={name}{settings}") for name, server in zip("abc", servers, strict=False)
        ]
        gateway = Gateway(
            Lifecycle(), lambda _: FakeConnection(own or FakeWorker("none")), secret=None, rng=random.Random(0),
            workers=[] if own is None else ["own"], **limits,
        )  # fmt: skip
        deadlines = Deadlines(connect=DEADLINE, answer=DEADLINE, silence=DEADLINE)
        gateway.add_foreign(
            specs,
            lambda spec: ForeignClient(spec.url, deadlines=deadlines),
            reader or PromptReader(block_size=16),
            recorder,
        )
        assert gateway.fleet is not None
        gateway.fleet.seconds = 0.01
        app = app or ServingSettings(bound_to_loopback=True)
        built = create_app(gateway.lifecycle, app, routers=[gateway.routes], collectors=[gateway.metrics])

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                on_send(message)
                await send(message)

            await built(scope, receive, sent)

        transport = httpx.ASGITransport(watched, raise_app_exceptions=False)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=DEADLINE)
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        it = Served(gateway, client, list(servers))
        await until(lambda: len(it.fleet.up) == sum(server.health == 200 for server in servers))
        yield it


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
async def test_a_stream_is_passed_on_without_the_usage_that_only_the_gateway_asked_for() -> None:
    async with served(FakeOpenAI(cached=48)) as it:
        answer = await it.ask(chat(stream=True))
        chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        assert answer.text.endswith("data: [DONE]\n\n")
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "".join(TOKENS)
        assert not any("usage" in chunk for chunk in chunks)
        assert json.loads(it.servers[0].requests[0][0])["stream_options"] == {"include_usage": True}
        assert it.fleet.workers[0].cached_tokens == 48


@on_a_loop
async def test_a_client_that_asks_for_usage_gets_it() -> None:
    async with served(FakeOpenAI(cached=48)) as it:
        answer = await it.ask(chat(stream=True, stream_options={"include_usage": True}))
        last = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}


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
async def test_a_request_is_retried_elsewhere_when_its_worker_dies_before_the_first_token() -> None:
    for is_stream, dies_after in ((False, 0), (True, 0), (True, 1)):
        async with served(FakeOpenAI(dies_after=dies_after), FakeOpenAI(dies_after=dies_after)) as it:
            it.servers[1].dies_after = None
            answers = [
                await it.ask(chat(f"{number}", stream=is_stream), **{"x-session-id": f"{number}"})
                for number in range(3)
            ]
            assert [answer.status_code for answer in answers] == [200] * 3
            assert all("error" not in answer.text for answer in answers)
            retried = [answer for answer in answers if "retried=1" in answer.headers["x-emberkv-route"]]
            assert len(retried) == len({sent for sent, _ in it.servers[0].requests})


@on_a_loop
async def test_a_stream_whose_first_event_is_an_error_is_retried_elsewhere_and_the_error_kept_where_all_fail() -> None:
    async with served(FakeOpenAI(fails_early=True), FakeOpenAI()) as it:
        for _ in range(4):
            answer = await it.ask(chat(stream=True))
            assert "three" in answer.text
            assert "out of memory" not in answer.text
        it.servers[1].fails_early = True
        answer = await it.ask(chat(stream=True))
        assert "out of memory" in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


@on_a_loop
async def test_a_request_on_a_kept_connection_that_is_closed_is_sent_again_and_its_worker_not_blamed() -> None:
    async with served(FakeOpenAI()) as it:
        (worker,) = it.fleet.workers
        it.servers[0].drops_kept = 1
        await until(lambda: it.servers[0]._known)
        while it.servers[0].drops_kept:  # a health check may be under way on the kept connection
            assert (await it.ask(chat())).status_code == 200
        assert worker.lost == 0


@on_a_loop
async def test_a_stream_gets_headers_and_pings_while_no_worker_has_begun_it() -> None:
    times = StreamTimes(headers=0.0, ping=0.0)
    app = ServingSettings(bound_to_loopback=True, stream_times=times)
    async with served(FakeOpenAI(), FakeOpenAI(), app=app) as it:
        for server in it.servers:
            server.held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat(stream=True)))
        await until(lambda: sum(it.asked()) == 1)
        first = it.asked().index(1)
        it.servers[first].dies_after = 0
        for server in it.servers:
            assert server.held is not None
            server.held.set()
        answer = await asked
        assert answer.status_code == 200
        assert ": ping: " in answer.text.partition("data:")[0]
        assert f": x-emberkv-route: worker={'ba'[first]};" in answer.text
        assert "three" in answer.text


@on_a_loop
async def test_a_late_refusal_is_the_last_event_of_the_stream() -> None:
    app = ServingSettings(bound_to_loopback=True, stream_times=StreamTimes(headers=0.0, ping=10.0))
    async with served(FakeOpenAI(status=503), app=app) as it:
        answer = await it.ask(chat(stream=True))
        assert (answer.status_code, answer.text) == (
            200,
            f": x-emberkv-route: {route_of(answer)}\n\n"
            'data: {"error":{"message":"no","type":"server_error","param":null,"code":null}}\n\ndata: [DONE]\n\n',
        )


def route_of(answer: httpx.Response) -> str:
    """What a late stream says of the route."""
    line = next(line for line in answer.text.splitlines() if line.startswith(": x-emberkv-route: "))
    return line.removeprefix(": x-emberkv-route: ")


@on_a_loop
async def test_an_answer_that_breaks_off_ends_with_an_error() -> None:
    async with served(FakeOpenAI(dies_after=2), FakeOpenAI(dies_after=2)) as it:
        answer = await it.ask(chat(stream=True))
        events = answer.text.split("\n\n")
        assert "One" in events[1]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert events[-2:] == ["data: [DONE]", ""]
        assert sum(worker.lost for worker in it.fleet.workers) == 1
        assert sum(it.asked()) == 1


@on_a_loop
async def test_a_stream_that_is_done_without_a_reason_to_end_is_an_error() -> None:
    async with served(FakeOpenAI(reason=None)) as it:
        answer = await it.ask(chat(stream=True))
        events = answer.text.split("\n\n")
        assert TOKENS[-1] in events[3]
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert answer.text.count("[DONE]") == 1
        assert it.fleet.workers[0].lost == 1


@on_a_loop
async def test_an_empty_stream_is_retried_elsewhere_and_else_an_error() -> None:
    async with served(FakeOpenAI(body=[]), FakeOpenAI()) as it:
        for _ in range(3):
            assert "three" in (await it.ask(chat(stream=True))).text
        it.servers[1].body = []
        answer = await it.ask(chat(stream=True))
        assert (answer.status_code, answer.json()["error"]["message"]) == (502, "the worker's answer has no choices")


@on_a_loop
async def test_a_client_that_asks_for_a_stream_gets_one_of_a_worker_that_does_not_stream() -> None:
    calls = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    async with served(FakeOpenAI(streams=False, message={"content": "I", "tool_calls": calls}, cached=48)) as it:
        answer = await it.ask(chat(stream=True))
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-emberkv-cache"].startswith("hit=48;")
        first, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        part = json.loads(first.removeprefix("data: "))
        assert (part["object"], "usage" in part) == ("chat.completion.chunk", False)
        delta = {"role": "assistant", "content": "I", "tool_calls": [{"index": 0, **calls[0]}]}
        assert part["choices"] == [{"index": 0, "delta": delta, "finish_reason": "stop"}]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_whole_answer_without_a_reason_to_end_is_not_a_complete_stream(path: str) -> None:
    @on_a_loop
    async def ask() -> None:
        async with served(FakeOpenAI(streams=False, message={"content": "I"}, reason=None)) as it:
            answer = await it.ask(chat(stream=True, max_tokens=4), path)
            assert (answer.status_code, "has no finish_reason" in answer.text) == (502, True)

    ask()


@on_a_loop
async def test_a_request_that_ends_its_connections_leaves_the_workers_up_and_is_given_up() -> None:
    servers = [FakeOpenAI(dies_after=0) for _ in range(3)]
    async with served(*servers) as it:
        answer = await it.ask(chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        assert all(it.asked())
        assert [worker.status for worker in it.fleet.workers] == [WorkerStatus.UP] * 3
        for server in servers:
            server.dies_after = None
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
async def test_a_worker_whose_connection_ended_is_checked_at_once() -> None:
    async with served(FakeOpenAI(dies_after=0)) as it:
        (worker,) = it.fleet.workers
        it.fleet.seconds = DEADLINE * 10
        checks = it.servers[0].checks
        await until(lambda: it.servers[0].checks > checks)  # the last one that was due by itself
        it.servers[0].health = 503
        await it.ask(chat())
        await until(lambda: worker.status is WorkerStatus.STARTING)


@on_a_loop
async def test_a_stream_without_done_is_whole_once_every_answer_has_its_reason_to_end() -> None:
    async with served(FakeOpenAI(sends_done=False)) as it:
        answer = await it.ask(chat(stream=True))
        assert "error" not in answer.text
        assert TOKENS[-1] in answer.text


@on_a_loop
async def test_a_busy_worker_is_passed_over_and_its_refusal_kept_where_all_are_busy() -> None:
    async with served(FakeOpenAI(status=429), FakeOpenAI(status=429)) as it:
        answer = await it.ask(chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert it.asked() == [1, 1]
        it.servers[1].status = 200
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
async def test_a_worker_that_is_gone_is_down_and_comes_back_with_nothing_cached() -> None:
    async with served(FakeOpenAI()) as it:
        worker = it.fleet.workers[0]
        await it.ask(chat())
        assert worker.as_json()["assumed_blocks"] > 0
        it.servers[0].health = 503
        await until(lambda: worker.status is WorkerStatus.STARTING)
        refused = await it.ask(chat())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        it.servers[0].health = 200
        await until(lambda: worker.status is WorkerStatus.UP)
        assert worker.as_json()["assumed_blocks"] > 0


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
async def test_more_requests_than_the_gateway_takes_are_refused() -> None:
    async with served(FakeOpenAI(), max_requests=1) as it:
        held = it.servers[0].held = asyncio.Event()
        first = asyncio.create_task(it.ask(chat()))
        await until(lambda: it.servers[0].requests)
        second = await it.ask(chat())
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        held.set()
        assert (await first).status_code == 200


@on_a_loop
async def test_a_stream_that_is_not_asked_for_by_a_boolean_counts_until_its_end() -> None:
    async with served(FakeOpenAI(), max_requests=1) as it:
        held = it.servers[0].held_stream = asyncio.Event()
        first = asyncio.create_task(it.ask(chat(stream=1)))
        (worker,) = it.fleet.workers
        await until(lambda: worker.running and not worker._unreported)
        for _ in range(100):  # the answer has begun, and is now sent
            await asyncio.sleep(0)
        refused = await it.ask(chat())
        held.set()
        assert "three" in (await first).text
        assert refused.status_code == 429
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_stream_is_accounted_for_before_its_last_event_is_sent(path: str) -> None:
    last = b"[DONE]" if path == CHAT else b"message_stop"
    counted: list[set[str]] = []

    def on_send(message: Message) -> None:
        if last in message.get("body", b""):
            it.gateway.in_flight.enter("", 1)  # raises TooManyRequestsError while the request is counted
            it.gateway.in_flight.leave("", 1)
            counted.append(set(it.fleet.workers[0].running))

    async with served(FakeOpenAI(cached=48), max_requests=1, on_send=on_send) as it:
        answer = await it.ask(chat(stream=True, max_tokens=9), path)
        assert (answer.status_code, last in answer.content, counted) == (200, True, [set()])
        assert it.fleet.workers[0].cached_tokens == 48


@on_a_loop
async def test_requests_of_emberkv_workers_and_forwarded_ones_are_bounded_together() -> None:
    async with served(FakeOpenAI(), max_requests=1) as it:
        it.gateway.in_flight.enter("", 1)  # as the engine of the emberkv workers does
        assert (await it.ask(chat())).status_code == 429
        it.gateway.in_flight.leave("", 1)
        assert (await it.ask(chat())).status_code == 200


@on_a_loop
async def test_a_forwarded_request_has_spans_and_its_worker_gets_the_trace() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = ServingSettings(bound_to_loopback=True, tracer=RequestTracer(provider))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with served(FakeOpenAI(cached=96), app=app) as it:
        await it.ask(chat(stream=True), traceparent=f"00-{trace_id}-{parent}-01")
        *children, span = exporter.get_finished_spans()
        assert span.context is not None
        assert span.parent is not None
        assert span.attributes is not None
        assert (span.name, f"{span.parent.span_id:016x}") == ("chat m", parent)
        assert [child.name for child in children] == ["prepare", "route", "prefill", "decode"]
        assert children[1].attributes is not None
        assert str(children[1].attributes["emberkv.route"]).startswith("worker=a;")
        assert (span.attributes["emberkv.cached_tokens"], span.attributes["gen_ai.usage.output_tokens"]) == (96, 3)
        sent = it.servers[0].requests[0][1]["traceparent"]
        assert sent == f"00-{trace_id}-{span.context.span_id:016x}-01"

        exporter.clear()
        it.servers[0].status = 503
        assert (await it.ask(chat())).status_code == 503
        (failed,) = exporter.get_finished_spans()
        assert failed.status.status_code is StatusCode.ERROR


@on_a_loop
async def test_a_tenants_flood_does_not_shut_out_another() -> None:
    app = ServingSettings(bound_to_loopback=True, api_keys=("key-of-one", "key-of-two"))
    one, two = {"authorization": "Bearer key-of-one"}, {"authorization": "Bearer key-of-two"}
    async with served(FakeOpenAI(), app=app, max_requests=2) as it:
        held = it.servers[0].held = asyncio.Event()
        flood = [asyncio.create_task(it.ask(chat(stream=True), **one)) for _ in range(2)]
        await until(lambda: it.asked() == [2])
        assert (await it.ask(chat(), **one)).status_code == 429
        other = asyncio.create_task(it.ask(chat(), **two))
        await until(lambda: other.done() or it.asked() == [3])
        held.set()
        assert [answer.status_code for answer in await asyncio.gather(*flood, other)] == [200] * 3
        again = [asyncio.create_task(it.ask(chat(), **one)) for _ in range(2)]
        assert [answer.status_code for answer in await asyncio.gather(*again)] == [200] * 2


@on_a_loop
async def test_a_tenants_limits_hold_for_forwarded_requests_and_count_what_the_worker_says() -> None:
    keys = {name: KeySource(sha256=key_digest(name).hex()) for name in ("one", "two")}
    limits = {"one": LimitsEntry(tokens_per_minute=20, concurrency=1), "two": LimitsEntry()}
    file = TenantsFile(tenants={name: TenantEntry(keys=[keys[name]], limits=limits[name]) for name in keys})
    app = ServingSettings(bound_to_loopback=True, tenants=Tenants(file=file, secret=b"secret"))
    async with served(FakeOpenAI(), app=app) as it:
        held = it.servers[0].held = asyncio.Event()
        first = asyncio.create_task(it.ask(chat(), **{"x-api-key": "one"}))
        await until(lambda: it.asked() == [1])
        refused = await it.ask(chat(), **{"x-api-key": "one"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        held.set()
        assert (await first).status_code == 200
        refused = await it.ask(chat(), **{"x-api-key": "one"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert (await it.ask(chat(), **{"x-api-key": "two"})).status_code == 200
        assert it.asked() == [2]


@on_a_loop
async def test_a_worker_that_hangs_is_given_up() -> None:
    async with served(FakeOpenAI(), FakeOpenAI()) as it:
        for server in it.servers:
            server.held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat()))
        await until(lambda: any(server.requests for server in it.servers))
        number = it.asked().index(1)
        other = it.servers[1 - number].held
        assert other is not None
        other.set()
        for _ in range(GIVEN_UP_AFTER):
            it.fleet.failed(it.fleet.workers[number], WorkerTimeoutError("it answers no check"))
        answer = await asked
        assert answer.status_code == 200
        assert "retried=1" in answer.headers["x-emberkv-route"]


@on_a_loop
async def test_an_answer_under_way_is_ended_with_an_error_when_the_gateway_stops() -> None:
    async with served(FakeOpenAI()) as it:
        it.servers[0].held = asyncio.Event()
        asked = asyncio.create_task(it.ask(chat()))
        await until(lambda: it.servers[0].requests)
        await it.gateway.lifecycle.drain(0.0)
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopped")


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
async def test_what_is_forwarded_is_recorded() -> None:
    recorded: list[RecordedRequest] = []
    recorder = TraceRecorder(recorded.append, block_size=16, key=bytes(32), clock=time.monotonic)
    async with served(FakeOpenAI(), FakeOpenAI(dies_after=0), recorder=recorder) as it:
        for number in range(3):
            await it.ask(chat(f"{number}", stream=True))
    recorder.close()
    assert [(each.output_tokens, each.known_tokens == each.prompt_tokens) for each in recorded] == [(3, True)] * 3
    shared = len(TEXT) // 64
    assert len({tuple(each.blocks[:shared]) for each in recorded}) == 1


@on_a_loop
async def test_an_answer_that_breaks_off_counts_by_what_came_of_it() -> None:
    recorded: list[RecordedRequest] = []
    recorder = TraceRecorder(recorded.append, block_size=16, key=bytes(32), clock=time.monotonic)
    async with served(FakeOpenAI(dies_after=3), recorder=recorder) as it:
        await it.ask(chat(stream=True))
    recorder.close()
    assert [each.output_tokens for each in recorded] == [2]


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
