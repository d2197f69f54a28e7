"""OpenTelemetry traces of requests: a span of each request and, within it, of what its time went to.

A request's span has the names and attributes of the semantic conventions for generative AI where these have them, and
``emberkv.`` attributes of the cache. Its children come one after another: ``prepare`` (it is parsed, rendered,
tokenized), ``route`` (a gateway chooses the worker), ``queue``, ``load`` (blocks come from lower tiers), ``prefill``
and ``decode``. No span has any text of a prompt or an answer. Spans are made once an answer has ended, so that tracing
delays none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emberkv.core.sequence import FinishReason
from emberkv.errors import ConfigError
from emberkv.serving.metrics import AnswerTimer
from emberkv.serving.request_context import EndedAnswer, RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

NANOSECONDS = 1_000_000_000
_OPERATIONS = {"completions": "text_completion", "generate": "text_completion"}
"""What the conventions call an API, by the name that metrics have; all others are chats."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a request's time. start, end: seconds since its arrival."""

    name: str
    start: float
    end: float


def stages(timer: AnswerTimer) -> Iterator[Stage]:
    """What an answer's time went to, in order; those that it did not have are left out.

    Each begins where the one before ends. Those before `decode` end by the first token at the latest, whatever the
    clock of another machine has measured.
    """
    limit = timer.total_seconds if timer.first_token_seconds is None else timer.first_token_seconds
    durations = [("prepare", timer.submitted_seconds)]
    if timer.route_seconds is not None:
        durations.append(("route", timer.route_seconds))
    if (queue := timer.queue_seconds) is not None:
        load = min(timer.load_seconds, queue)
        durations += [("queue", queue - load), *([("load", load)] if load else [])]
    at = 0.0
    for name, seconds in durations:
        end = min(at + seconds, limit)
        yield Stage(name, at, end)
        at = end
    if timer.first_token_seconds is not None:
        yield Stage("prefill", at, limit)
        yield Stage("decode", limit, timer.total_seconds)


class RequestTracer:
    """Makes the spans of requests by a provider of OpenTelemetry's SDK, and hands them to its processors. ::

    RequestTracer.exporting("http://127.0.0.1:4318")
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - an extra
            TraceContextTextMapPropagator,
        )

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("emberkv")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exporting(cls, endpoint: str) -> "RequestTracer":
        """To a collector, by OTLP over HTTP. endpoint: its URL, without ``/v1/traces``.

        OpenTelemetry's environment variables (``OTEL_SERVICE_NAME``, ``OTEL_EXPORTER_OTLP_HEADERS``) count, too.
        Raises ConfigError where the SDK is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - an extra
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--otlp-endpoint needs OpenTelemetry's SDK ({error.name} is missing): pip install '.[otel]' "
                "in emberkv's folder"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "emberkv"}))
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, request: RequestContext, *, model: str, began: float) -> "Span":
        """Begin the span of a request that is forwarded, before its answer is known. model: its name. began: seconds
        since 1970.
        """
        parent = self._propagator.extract({"traceparent": request.traceparent})
        return self._tracer.start_span(
            f"{_operation(request)} {model}",
            context=parent,
            kind=self._api.SpanKind.SERVER,
            start_time=_nanoseconds(began),
        )

    def headers(self, span: "Span") -> dict[str, str]:
        """The headers by which the server that a request is forwarded to makes its spans within ``span``."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier

    def failed(self, span: "Span", *, now: float) -> None:
        """End the span of a forwarded request that was not answered. now: seconds since 1970."""
        span.set_status(self._api.StatusCode.ERROR)
        span.end(_nanoseconds(now))

    def record(
        self,
        request: RequestContext,
        answers: Sequence[tuple[str, EndedAnswer, AnswerTimer]],
        *,
        model: str,
        route: Mapping[str, str],
        now: float,
        span: "Span | None" = None,
    ) -> None:
        """Make the spans of an ended request. answers: with the ids that they have in the engine. model: its name.
        route: attributes of the routing decision; empty where there was none. now: seconds since 1970. span: the
        request's, if `begin` has made it.
        """
        total = max(timer.total_seconds for _, _, timer in answers)
        began = now - total
        if span is None:
            span = self.begin(request, model=model, began=began)
        span.set_attributes(
            {
                "gen_ai.operation.name": _operation(request),
                "gen_ai.provider.name": "emberkv",
                "gen_ai.request.model": model,
                "gen_ai.response.id": request.request_id,
                "gen_ai.response.finish_reasons": [
                    (answer.finish_reason or FinishReason.ABORT).value for _, answer, _ in answers
                ],
                "gen_ai.usage.input_tokens": sum(answer.usage.prompt_tokens for _, answer, _ in answers),
                "gen_ai.usage.output_tokens": sum(answer.completion_tokens for _, answer, _ in answers),
                "emberkv.api": request.api,
                "emberkv.cached_tokens": sum(answer.usage.cached_tokens for _, answer, _ in answers),
            }
        )
        for _, answer, _ in answers:
            for tier, tokens in answer.usage.tokens_by_tier.items():
                span.set_attribute(f"emberkv.cached_tokens.{tier}", tokens)
        if any(answer.finish_reason is FinishReason.ERROR for _, answer, _ in answers):
            span.set_status(self._api.StatusCode.ERROR)
        inside = self._api.set_span_in_context(span)
        for _, _, timer in answers:
            for stage in stages(timer):
                child = self._tracer.start_span(
                    stage.name, context=inside, start_time=_nanoseconds(began + stage.start)
                )
                if stage.name == "route":
                    child.set_attributes({f"emberkv.{name}": value for name, value in route.items()})
                child.end(_nanoseconds(began + stage.end))
        span.end(_nanoseconds(now))

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()


class ForwardedTrace:
    """The span of a request that is forwarded. Each must end, by `record` or by `failed`."""

    def __init__(self, tracer: RequestTracer, span: "Span", model: str, wall_clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._span = span
        self._model = model
        self._wall_clock = wall_clock
        self.headers = tracer.headers(span)

    def record(self, request: RequestContext, answer: EndedAnswer, timer: AnswerTimer, route: str) -> None:
        """End it, with the spans of what the answer's time went to. route: as ``x-emberkv-route`` says it."""
        ended = [(request.request_id, answer, timer)]
        now = self._wall_clock()
        self._tracer.record(request, ended, model=self._model, route={"route": route}, now=now, span=self._span)

    def failed(self) -> None:
        """End it for a request that no worker has answered."""
        self._tracer.failed(self._span, now=self._wall_clock())


def _operation(request: RequestContext) -> str:
    return _OPERATIONS.get(request.api, "chat")


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
