"""Starts the answers to API requests, sends them, and accounts for each request once its answers have ended."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from emberkv.serving.answers.answer import Answer
from emberkv.serving.answers.answer_stream import AnswerStream
from emberkv.serving.answers.cache_header import CACHE_HEADER, CacheSummary, summary_of
from emberkv.serving.answers.generator import Prompt, TextGenerator
from emberkv.serving.errors import request_info
from emberkv.serving.http.responses import ResponseWriter, respond
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.metrics.request_metrics import ServingMetrics, TenantMetrics
from emberkv.serving.request_context import RecentRequests, RequestContext, Sessions, session_id
from emberkv.serving.request_log import log_finished
from emberkv.serving.tenancy.tenants import Tenant
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.workers import WorkerPool

_ID_PREFIXES = {
    "messages": "msg_",
    "chat_completions": "chatcmpl-",
    "completions": "cmpl-",
    "generate": "gen-",
    "warm": "warm-",
}


class AnswerService:
    """Serves prompts on the model that ``lifecycle`` holds. It belongs to the event loop.

    recent: the last requests. sessions, tenant_metrics: statistics of ended requests. clock: monotonic seconds.
    wall_clock: seconds since 1970. recorder: records every request in a trace.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        workers: WorkerPool,
        metrics: ServingMetrics,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.recent = RecentRequests()
        self.sessions = Sessions()
        self.tenant_metrics = TenantMetrics(lifecycle.engine_stats)
        self._lifecycle = lifecycle
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._recorder = recorder
        self._generator: TextGenerator | None = None
        lifecycle.on_unload.append(self._forget_generator)

    def request(
        self, http: Request, api: str, tenant: Tenant, canonical: Mapping[str, int] | None = None
    ) -> RequestContext:
        """The context of a request to ``api``, one of the names that metrics have.

        canonical: how many lines or tools each rule changed. Raises RequestError for a session id that is too long.
        """
        info = request_info(http)
        return RequestContext(
            _ID_PREFIXES[api] + uuid.uuid4().hex,
            api,
            tenant,
            info.arrived,
            session=session_id(http.headers),
            canonical=canonical or {},
            http_id=info.request_id,
            created=int(self._wall_clock()),
        )

    def start(self, prompts: Sequence[Prompt], request: RequestContext) -> AnswerStream:
        """Start the answers to ``request``, one a prompt; a server that drains waits for them.

        Raises NotReadyError unless the server takes requests, else what ``Engine.submit`` raises.
        """
        self._lifecycle.check_accepting()
        if self._generator is None:
            self._generator = self._make_generator()
        stream = self._generator.start(prompts, request, on_close=partial(self._closed, request))
        self._lifecycle.track(stream)
        self.recent.add(request)
        return stream

    async def respond(
        self, http: Request, stream: AnswerStream, writer: ResponseWriter, *, as_events: bool
    ) -> Response:
        """Send the answers in the API's wire form, with the header that says what was cached."""
        return await respond(http, stream, writer, partial(self._headers, stream), self._workers, as_events=as_events)

    def _forget_generator(self) -> None:
        self._generator = None

    def _make_generator(self) -> TextGenerator:
        model = self._lifecycle.model()
        engine = model.engine if self._recorder is None else self._recorder.over(model.engine, model.public)
        return TextGenerator(engine, model.tokenizer, metrics=self._metrics, clock=self._clock)

    def _headers(self, stream: AnswerStream) -> dict[str, str]:
        request_id, answer, _ = stream.timed_answers[0]
        further = self._lifecycle.model().headers(request_id)
        return {CACHE_HEADER: str(self._summary(request_id, answer)), **further}

    def _summary(self, request_id: str, answer: Answer) -> CacheSummary:
        cache = self._lifecycle.model().cache
        explanation = cache.ledger_store.explained(request_id) if cache is not None else None
        return summary_of(answer.usage, explanation)

    def _closed(self, request: RequestContext, stream: AnswerStream) -> None:
        self._lifecycle.untrack(stream)
        usages = [answer.usage for answer in stream.answers]
        self.sessions.count(request, usages, self._wall_clock())
        self.tenant_metrics.count(request.tenant.name, usages)
        for request_id, answer, timer in stream.timed_answers:
            log_finished(request, request_id, answer, timer, self._summary(request_id, answer))
        if (reuse := self._lifecycle.reuse()) is not None:
            reuse.settle()
