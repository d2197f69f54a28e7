"""OpenTelemetry spans: of each request, and of what its time went to."""

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import TokenOutput
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.metrics import AnswerTimer, ServingMetrics
from emberkv.serving.tracing import NANOSECONDS, RequestTracer, Stage, stages
from tests.serving.fakes import FakeEngine, Script
from tests.serving.harness import MODEL, Client

NOW = 1_800_000_000.0
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 5}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(lifecycle: Lifecycle, exporter: InMemorySpanExporter) -> Client:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = ServingSettings(tracer=RequestTracer(provider))
    return Client(create_app(lifecycle, settings, wall_clock=lambda: NOW))


def split(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The request's span, which ends last, and those within it."""
    *children, request = exporter.get_finished_spans()
    return request, list(children)


def test_a_request_belongs_to_its_clients_trace_and_says_what_it_used(
    client: Client, exporter: InMemorySpanExporter
) -> None:
    answer = client.post("/v1/chat/completions", CHAT, headers={"traceparent": PARENT}).json()
    span, children = split(exporter)
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    assert span.parent is not None
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.attributes is not None
    usage = answer["usage"]
    assert {name: span.attributes[name] for name in span.attributes} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "emberkv",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "emberkv.api": "chat_completions",
        "emberkv.cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }
    assert [child.name for child in children] == ["prepare", "queue", "prefill", "decode"]
    for child in children:
        assert child.parent is not None
        assert child.parent.span_id == span.context.span_id
        assert span.start_time is not None and span.end_time is not None  # noqa: PT018 - for the type checker
        assert child.start_time is not None and child.end_time is not None  # noqa: PT018 - for the type checker
        assert span.start_time <= child.start_time <= child.end_time <= span.end_time
    assert span.end_time == NOW * NANOSECONDS
    assert "secret" not in span.to_json() + "".join(child.to_json() for child in children)


def test_without_a_parent_a_request_begins_a_trace(client: Client, exporter: InMemorySpanExporter) -> None:
    client.post("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1}, headers={"traceparent": "odd"})
    span, _ = split(exporter)
    assert (span.name, span.parent) == ("text_completion tiny", None)


def test_a_failed_answer_is_an_error(client: Client, engine: FakeEngine, exporter: InMemorySpanExporter) -> None:
    engine.script = Script("Hello", finish=FinishReason.ERROR, error="out of memory")
    assert client.post("/v1/chat/completions", CHAT).status_code == 500
    span, _ = split(exporter)
    assert span.status.status_code is StatusCode.ERROR


def test_a_request_that_the_engine_refuses_is_refused_as_without_traces(
    client: Client, exporter: InMemorySpanExporter
) -> None:
    answer = client.post("/v1/completions", {"model": MODEL, "prompt": [100_000]})
    assert answer.status_code == 400, answer.text
    assert exporter.get_finished_spans() == ()


def test_time_goes_to_the_stages_one_after_another() -> None:
    now = iter([1.0, 4.0, 6.0, 9.0])
    timer = AnswerTimer(ServingMetrics(lambda: None), lambda: next(now), api="messages", arrived=0.5)
    timer.record(TokenOutput("a", (1,), queue_seconds=2.0, load_seconds=0.75, route_seconds=0.25))
    timer.record(TokenOutput("a", (2,)))
    timer.finished(FinishReason.STOP)
    assert list(stages(timer)) == [
        Stage("prepare", 0.0, 0.5),
        Stage("route", 0.5, 0.75),
        Stage("queue", 0.75, 2.0),
        Stage("load", 2.0, 2.75),
        Stage("prefill", 2.75, 3.5),
        Stage("decode", 3.5, 8.5),
    ]
