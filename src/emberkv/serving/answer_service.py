"""From an API request to its response: its prompts are prepared, answered by the engine, and sent as text.

`RequestPreparer` parses, renders and tokenizes; `TextGenerator` submits to the engine; `AnswerService` starts answers,
sends them whole or as server-sent events, and accounts for each request once its answers have ended.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emberkv.core.explaining.explanation import Explanation
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, Engine, GenerationRequest, SamplingParams
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import EmberError
from emberkv.serving.admission import ConcurrencyLimit, RateLimits, TenantLimits
from emberkv.serving.answers.answer import Answer, Echo, OutputParsing
from emberkv.serving.answers.answer_memory import AnswerMemory, AnswerRecorder
from emberkv.serving.answers.answer_stream import AnswerStream, OutputQueue, WholeAnswer
from emberkv.serving.background import WorkerPool
from emberkv.serving.cache.volatile_lines import MIN_MISS, VolatileLines
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.dashboard import AnsweredTurn, RecentTraffic, tokens_by_source
from emberkv.serving.errors import CLIENT_GONE, RequestTimeoutError, request_info
from emberkv.serving.event_stream import EventStream, EventWriter, StreamTimes, unless_disconnected
from emberkv.serving.generated_sequences import GeneratedSequences
from emberkv.serving.lifecycle import FirstDifference, Lifecycle, ServedModel
from emberkv.serving.metrics import AnswerTimer, Clock, ServingMetrics
from emberkv.serving.next_turns import NextTurns, RenderNext
from emberkv.serving.request_context import (
    CACHE_HEADER,
    CacheSummary,
    EndedAnswer,
    RecentRequests,
    RecentSessions,
    RequestContext,
    log_finished,
    random_id,
    session_id,
    summary_of,
)
from emberkv.serving.tenancy import Tenant
from emberkv.serving.tenant_metrics import TenantMetrics
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.tracing import ForwardedTrace, RequestTracer

MAX_REQUESTS = 512
MANY_LOGPROBS = 2000  # from here on, writing them down would be felt by others on the event loop

T = TypeVar("T")


class ResponseWriter(EventWriter, Protocol):
    """Writes the answers to one request in an API's wire form: as server-sent events, or as one JSON object."""

    def whole(self, answers: list[WholeAnswer]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one answer: token ids, and how they are continued.

    retain_tokens: how many of them, from the first, the cache retains for ``retain_seconds``. wants_no_tokens:
    ``max_tokens`` is 0; the engine draws one token, because a prompt's last step ends with it, and the token is left
    out. echo: stands before the answer, with log-probabilities where the request wants them. is_clipped: the request
    asked for more tokens than fit, so that its ``max_tokens`` are fewer. parsing: how the answer is parsed; None: it is
    text. system: the text of its system prompt, in which volatile lines are looked for. history, recorder, next_prompt,
    borders: see `emberkv.serving.api.rendering.RenderedPrompt`.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    retain_tokens: int = 0
    retain_seconds: float = 0.0
    wants_no_tokens: bool = False
    echo: Echo | None = None
    is_clipped: bool = False
    parsing: OutputParsing | None = None
    system: str = ""
    history: Mapping[str, int] = field(default_factory=dict)
    recorder: AnswerRecorder | None = None
    next_prompt: RenderNext | None = None
    borders: tuple[int, ...] = ()


class TextGenerator:
    """Starts answers on a model's engine. Belongs to one event loop at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, metrics: ServingMetrics, clock: Clock) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._clock = clock
        self._outputs: OutputQueue | None = None

    def start(
        self, prompts: Sequence[Prompt], request: RequestContext, *, on_close: Callable[[AnswerStream], None]
    ) -> AnswerStream:
        """Submit one request a prompt; call from the event loop.

        Raises what ``Engine.submit`` raises; then nothing is left running.
        """
        loop = asyncio.get_running_loop()
        if self._outputs is None or self._outputs.loop is not loop:
            self._outputs = OutputQueue(loop)
        stream = AnswerStream(self._engine, on_close)
        stream.history = prompts[0].history
        stream.clipped_to = min((each.params.max_tokens for each in prompts if each.is_clipped), default=None)
        try:
            for index, prompt in enumerate(prompts):
                generation = GenerationRequest(
                    request.answer_id(index),
                    prompt.token_ids,
                    prompt.params,
                    request.tenant.salt,
                    tenant=request.tenant.name,
                    session_id=request.session,
                    retain_tokens=prompt.retain_tokens,
                    retain_seconds=prompt.retain_seconds,
                    worker=request.worker,
                    seq_id=request.seq_id,
                    borders=prompt.borders,
                )
                answer = Answer(
                    index,
                    len(prompt.token_ids),
                    self._tokenizer.detokenizer(() if prompt.parsing is None else prompt.parsing.special_tokens),
                    prompt.params.stop,
                    wants_no_tokens=prompt.wants_no_tokens,
                    echo=prompt.echo,
                    parsing=prompt.parsing,
                    min_tokens=prompt.params.min_tokens,
                    recorder=prompt.recorder,
                )
                timer = AnswerTimer(self._metrics, self._clock, api=request.api, arrived=request.arrived)
                stream.add(generation, answer, timer, self._outputs)
                self._metrics.prompt_tokens.labels(request.api).observe(len(prompt.token_ids))
        except BaseException:
            stream.close()
            raise
        return stream


MAX_TOKENS_HEADER = "x-emberkv-max-tokens"
LEFT_OUT_HEADER = "x-emberkv-left-out"
HISTORY_HEADER = "x-emberkv-history"
"""What became of the answers in the prompt's history; see `emberkv.serving.api.splicing`."""
ROUTE_HEADER = "x-emberkv-route"
"""At a gateway: which worker a request was routed to, and why."""
ANSWER_HEADERS = CACHE_HEADER, MAX_TOKENS_HEADER, LEFT_OUT_HEADER, HISTORY_HEADER, ROUTE_HEADER
"""The headers that describe an answer. Pages of other origins may read them where CORS allows the origin."""


LARGE_BODY_BYTES = 20_000
"""From here on, parsing and tokenizing on the event loop would delay other requests noticeably."""


def counts_header(counts: Mapping[str, int]) -> str:
    """Counts as a header's value.

    >>> counts_header({"image": 2, "web_search_20250305": 1})
    'image=2;web_search_20250305=1'
    """
    return ";".join(f"{name}={count}" for name, count in counts.items())


class RequestPreparer:
    """Parses, renders and tokenizes the requests to the model that ``lifecycle`` holds; large ones on ``workers``.

    rules: rewrite prompts before they are rendered. memory: of answers; None: they are not remembered.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        workers: WorkerPool,
        rules: CanonicalRules | None = None,
        memory: AnswerMemory | None = None,
    ) -> None:
        self.rules = rules
        self._memory = memory
        self._lifecycle = lifecycle
        self._workers = workers

    async def prepare(self, work: Callable[[bytes, ServedModel], T], body: bytes, tenant: Tenant) -> T:
        """What ``work`` returns for a body, given the model as ``tenant`` sees it, or raises.

        Raises NotReadyError before the model is loaded, unless it is loaded on demand, and OverloadedError when too
        many large requests wait.
        """
        await self._lifecycle.ensure_model()
        return await self.run(partial(work, body, self.model_for(tenant.name)), len(body))

    def model_for(self, tenant: str) -> ServedModel:
        """The model as a tenant sees it. Raises NotReadyError before it is loaded."""
        return self._lifecycle.model().seen_by(tenant, self._memory)

    async def run(self, work: Callable[[], T], body_bytes: int | None = None) -> T:
        """What ``work`` on a body of this size returns or raises; None: of any size. Raises OverloadedError."""
        is_small = body_bytes is not None and body_bytes <= LARGE_BODY_BYTES
        return work() if is_small else await self._workers.run(work)


_ID_PREFIXES = {
    "messages": "msg_",
    "chat_completions": "chatcmpl-",
    "completions": "cmpl-",
    "responses": "resp_",
    "generate": "gen-",
    "warm": "warm-",
}


class AnswerService:
    """Serves prompts on the model that ``lifecycle`` holds. It belongs to the event loop.

    recent: the last requests. generated: sequences of the model's own engine. sessions, traffic, tenant_metrics,
    volatile_lines: of ended requests. clock: monotonic seconds. wall_clock: seconds since 1970. recorder: records every
    request in a trace. request_timeout: seconds from the arrival of a request to the end of its answers; None: no
    limit. max_requests: see `ConcurrencyLimit`. limits: of each tenant, by name. next_turn_tokens: how many tokens a
    minute `NextTurns` computes.
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
        request_timeout: float | None = None,
        stream_times: StreamTimes | None = None,
        max_requests: int | None = MAX_REQUESTS,
        limits: Mapping[str, RateLimits] | None = None,
        tracer: RequestTracer | None = None,
        next_turn_tokens: int = 0,
    ) -> None:
        self.recent = RecentRequests()
        self.sessions = RecentSessions()
        self.traffic = RecentTraffic()
        self.generated = GeneratedSequences()
        self.volatile_lines = VolatileLines()
        self.tenant_metrics = TenantMetrics(lifecycle.engine_stats)
        self._lifecycle = lifecycle
        self._workers = workers
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._recorder = recorder
        self._request_timeout = request_timeout
        self._stream_times = stream_times or StreamTimes()
        self._in_flight = ConcurrencyLimit(max_requests)
        self.limits = TenantLimits(limits or {}, clock, self.tenant_metrics.limited)
        self._tracer = tracer
        self._next_turns = NextTurns(lifecycle, workers, tokens_a_minute=next_turn_tokens, clock=clock)
        metrics.register(self._next_turns)
        self._generator: TextGenerator | None = None
        self._observing: asyncio.Task[None] | None = None
        lifecycle.on_unload += [self._forget_generator, self.generated.clear]

    def request(
        self,
        http: Request,
        api: str,
        tenant: Tenant,
        canonical: Mapping[str, int] | None = None,
        *,
        user_id: str = "",
        inferred_session: str = "",
        left_out: Mapping[str, int] | None = None,
    ) -> RequestContext:
        """The context of a request to ``api``, one of the names that metrics have.

        canonical: how many lines or tools each rule changed. user_id: names the session where no header does, see
        `session_id`. inferred_session, left_out: as in `RequestContext`. Raises RequestError for a session id that is
        too long.
        """
        info = request_info(http)
        return RequestContext(
            _ID_PREFIXES[api] + random_id(),
            api,
            tenant,
            info.arrived,
            session=session_id(http.headers, user_id),
            canonical=canonical or {},
            http_id=info.request_id,
            created=int(self._wall_clock()),
            left_out=left_out or {},
            traceparent=http.headers.get("traceparent", ""),
            inferred_session=inferred_session,
        )

    def start(self, prompts: Sequence[Prompt], request: RequestContext) -> AnswerStream:
        """Start the answers to ``request``, one a prompt; a server that drains waits for them.

        Raises NotReadyError unless the server takes requests, TooManyRequestsError where it has too many,
        RateLimitedError where the tenant has, else what ``Engine.submit`` raises.
        """
        self._lifecycle.check_accepting()
        if self._generator is None:
            self._generator = self._make_generator()
        model = self._lifecycle.model()  # accounts for the answers, even if it is unloaded or replaced meanwhile
        self._enter(request.tenant.name, prompts)  # `_closed` follows, even if no answer can be started
        self._next_turns.request_arrived(request, prompts[0].next_prompt)
        stream = self._generator.start(prompts, request, on_close=partial(self._closed, model, request, prompts))
        if (timeout := self._request_timeout) is not None:
            left = request.arrived + timeout - self._clock()
            text = f"the answer was not finished {timeout:g} s after its request, which is this server's limit"
            stream.interrupt_after(max(0.0, left), RequestTimeoutError(text))
        self._lifecycle.track(stream)
        stream.on_exit = partial(self._lifecycle.untrack, stream)
        self.recent.add(request)
        self._count_changes(request)
        for outcome, answers in stream.history.items():
            self._metrics.history_answers.labels(outcome).inc(answers)
        return stream

    def _enter(self, tenant: str, prompts: Sequence[Prompt]) -> None:
        self._in_flight.enter(tenant, len(prompts))
        try:
            self.limits.enter(tenant, len(prompts))  # last, so that what is refused does not count
        except EmberError:
            self._in_flight.leave(tenant, len(prompts))
            raise
        self.limits.count(tenant, sum(len(prompt.token_ids) for prompt in prompts))

    def forward(self, request: RequestContext) -> AnswerTimer:
        """Times a request that is answered elsewhere, without an engine; `forwarded` is called when it has ended."""
        return AnswerTimer(self._metrics, self._clock, api=request.api, arrived=request.arrived)

    def begin_trace(self, request: RequestContext, model: str) -> ForwardedTrace | None:
        """Begin the span of a request that is forwarded; None if there is no tracer."""
        if self._tracer is None:
            return None
        began = self._wall_clock() - (self._clock() - request.arrived)
        span = self._tracer.begin(request, model=model, began=began)
        return ForwardedTrace(self._tracer, span, model, self._wall_clock)

    def forwarded(
        self, request: RequestContext, answer: EndedAnswer, timer: AnswerTimer, summary: CacheSummary
    ) -> None:
        """Account for a request that was answered elsewhere."""
        self._count_changes(request)
        timer.finished(answer.finish_reason or FinishReason.ABORT)
        self._metrics.prompt_tokens.labels(request.api).observe(answer.usage.prompt_tokens)
        self._count(request, [answer.usage])
        self._count_answer(request, request.request_id, answer, timer, summary)

    def _count_changes(self, request: RequestContext) -> None:
        for rule, changes in request.canonical.items():
            self._metrics.canonical_changes.labels(rule).inc(changes)

    async def respond(
        self,
        http: Request,
        stream: AnswerStream,
        writer: ResponseWriter,
        *,
        as_events: bool,
        has_late_headers: bool = False,
    ) -> Response:
        """Send the answers in the API's wire form, and what was cached: in a header, or in comments of the events.

        has_late_headers: see `EventStream`.
        """
        headers = self._headers(stream)
        account = partial(self._account, self._lifecycle.model(), stream)
        if as_events:
            times = self._stream_times
            return EventStream(stream, writer, headers, account, times, has_late_headers=has_late_headers)
        async with stream:
            answers = await unless_disconnected(http.receive, stream.collect())
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        if sum(len(answer.logprobs) for answer in answers) > MANY_LOGPROBS:
            whole = await self._workers.run(partial(writer.whole, answers))
        else:
            whole = writer.whole(answers)
        return JSONResponse(whole, headers={**headers, **account()})

    def _forget_generator(self) -> None:
        self._generator = None

    def engine(self) -> Engine:
        """The model's, with its requests recorded where they are to be. Raises NotReadyError before it is loaded."""
        model = self._lifecycle.model()
        engine = model.engine if model.assembled is None else self.generated.over(model.engine)
        return engine if self._recorder is None else self._recorder.over(engine, model.public)

    def _make_generator(self) -> TextGenerator:
        model = self._lifecycle.model()
        return TextGenerator(self.engine(), model.tokenizer, metrics=self._metrics, clock=self._clock)

    def _headers(self, stream: AnswerStream) -> dict[str, str]:
        """What is known of a request from the beginning."""
        request = self.recent.get(stream.timed_answers[0][0])
        clipped = {} if stream.clipped_to is None else {MAX_TOKENS_HEADER: str(stream.clipped_to)}
        left_out = {LEFT_OUT_HEADER: counts_header(request.left_out)} if request and request.left_out else {}
        history = {HISTORY_HEADER: counts_header(stream.history)} if stream.history else {}
        return {**clipped, **left_out, **history}

    def _account(self, model: ServedModel, stream: AnswerStream) -> dict[str, str]:
        """What the cache had of the first prompt, and what else is known of a request that has been answered."""
        request_id, answer, _ = stream.timed_answers[0]
        return {CACHE_HEADER: str(self._summary(model, request_id, answer)), **model.headers(request_id)}

    def _summary(self, model: ServedModel, request_id: str, answer: Answer) -> CacheSummary:
        explanation = None if model.cache is None else model.cache.ledger_store.explained(request_id)
        return summary_of(answer.usage, explanation)

    def _observe(
        self, model: ServedModel, request: RequestContext, prompts: Sequence[Prompt], stream: AnswerStream
    ) -> None:
        """Look for volatile lines in the first prompt; the others of a request are like it."""
        prompt = prompts[0]
        if model.first_difference is not None and stream.answers and prompt.system:
            missed = stream.answers[0].usage.computed_tokens
            if missed >= MIN_MISS and (self._observing is None or self._observing.done()):
                work = self._observe_elsewhere(model, model.first_difference, request, prompt)
                self._observing = asyncio.create_task(work, name="volatile lines")
        explanation = None if model.cache is None else model.cache.ledger_store.explained(request.request_id)
        if explanation is not None:
            self.observe(request, prompt.token_ids, prompt.system, explanation, model.tokenizer)

    def observe(
        self,
        request: RequestContext,
        prompt: Sequence[int],
        system: str,
        explanation: Explanation,
        tokenizer: Tokenizer,
    ) -> None:
        """Look for volatile lines in a prompt that was answered."""
        now = self._wall_clock()
        self.volatile_lines.observe(request.tenant.name, prompt, system, explanation, tokenizer, now)

    async def _observe_elsewhere(
        self, model: ServedModel, first_difference: FirstDifference, request: RequestContext, prompt: Prompt
    ) -> None:
        """As `_observe`, of a request that a worker has answered. One at a time is asked about: lines that matter come
        again.
        """
        position = await first_difference(request.request_id)
        if position is not None:
            self.volatile_lines.observe_at(
                request.tenant.name, prompt.token_ids, prompt.system, position, model.tokenizer, self._wall_clock()
            )

    def _trace(self, tracer: RequestTracer, model: ServedModel, request: RequestContext, stream: AnswerStream) -> None:
        route = {name.removeprefix("x-emberkv-"): value for name, value in model.headers(request.request_id).items()}
        tracer.record(request, stream.timed_answers, model=model.names[0], route=route, now=self._wall_clock())

    def _closed(
        self, model: ServedModel, request: RequestContext, prompts: Sequence[Prompt], stream: AnswerStream
    ) -> None:
        self._lifecycle.finished(stream)
        self._in_flight.leave(request.tenant.name, len(prompts))
        self.limits.leave(request.tenant.name, len(prompts))
        self.limits.count(request.tenant.name, sum(answer.completion_tokens for answer in stream.answers))
        self._count(request, [answer.usage for answer in stream.answers])
        for request_id, answer, timer in stream.timed_answers:
            self._count_answer(request, request_id, answer, timer, self._summary(model, request_id, answer))
        if self._tracer is not None and stream.timed_answers:  # none where the engine has refused the request
            self._trace(self._tracer, model, request, stream)
        self._observe(model, request, prompts, stream)
        if (reuse := self._lifecycle.reuse()) is not None:
            reuse.apply_pending()
        self._compute_next_turn(request, prompts, stream)

    def _compute_next_turn(self, request: RequestContext, prompts: Sequence[Prompt], stream: AnswerStream) -> None:
        (prompt, *others), answers = prompts, stream.answers
        if answers and not others and prompt.next_prompt is not None:
            (answer,) = answers
            is_whole = answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and not answer.wants_no_tokens
            if is_whole and not answer.calls:
                self._next_turns.turn_ended(request, prompt.token_ids, answer.message, prompt.next_prompt)
        self._next_turns.begin_if_idle()

    def _count(self, request: RequestContext, usages: Sequence[CacheUsage]) -> None:
        self.sessions.count(request, usages, self._wall_clock())
        self.tenant_metrics.count(request.tenant.name, usages)

    def _count_answer(
        self, request: RequestContext, request_id: str, answer: EndedAnswer, timer: AnswerTimer, summary: CacheSummary
    ) -> None:
        tokens = tokens_by_source(answer.usage)
        self.traffic.count(request, AnsweredTurn(request_id, self._wall_clock(), tokens, timer.first_token_seconds))
        log_finished(request, request_id, answer, timer, summary)
