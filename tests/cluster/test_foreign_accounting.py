"""Requests forwarded to foreign workers: limits that hold for them, their traces, and what is recorded of them."""

import asyncio
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.types import Message

from emberkv.serving.app import ServingSettings
from emberkv.serving.tenancy import KeySource, LimitsEntry, TenantEntry, Tenants, TenantsFile, key_digest
from emberkv.serving.trace_recorder import RecordedRequest, TraceRecorder
from emberkv.serving.tracing import RequestTracer
from tests.cluster.fake_openai import FakeOpenAI
from tests.cluster.foreign_gateway import CHAT, TEXT, chat, served
from tests.waiting import on_a_loop, until


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
