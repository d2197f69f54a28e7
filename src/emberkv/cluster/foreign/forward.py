"""Forwards one request to one foreign worker, relays the answer, and accounts for both."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from emberkv.cluster.foreign.answers import (
    AnswerEvents,
    ChatAnswer,
    ChatStream,
    answer_headers,
    as_stream,
    choices_of,
    decoded,
    usage_of,
)
from emberkv.cluster.foreign.conversion import Conversion, MessageResponseWriter
from emberkv.cluster.foreign.prompts import RoutedPrompt
from emberkv.cluster.foreign.worker import ForeignWorker, ReportedUsage
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, GenerationRequest, SamplingParams, TokenOutput
from emberkv.errors import ClusterError, EmberError, WorkerLostError
from emberkv.serving.answer_service import AnswerService
from emberkv.serving.api.openai_api import DONE
from emberkv.serving.errors import (
    GenerationFailedError,
    HttpFailure,
    anthropic_error,
    anthropic_status,
    failure_mid_stream,
    openai_error,
)
from emberkv.serving.event_stream import sse_event, unless_disconnected
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.request_context import CACHE_HEADER, CacheSummary, RequestContext, summary_of
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.tracing import ForwardedTrace

if TYPE_CHECKING:  # an extra
    import aiohttp

ANY_LENGTH = 1 << 20
"""``max_tokens`` in a recorded trace for a request without a limit."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A client's request as it is forwarded.

    path: of the API. data: the body. streams: whether it asks for a stream. keeps_usage: whether the client itself asks
    for usage in the stream. max_tokens: the limit of the answer; None if the request has none. conversion: of a request
    to another API, whose answer is converted back; None: the answer is passed on as it is. model: as
    the client names it. system: the text of its system prompt.
    """

    context: RequestContext
    path: str
    data: bytes
    headers: Mapping[str, str]
    prompt: RoutedPrompt
    streams: bool
    keeps_usage: bool
    max_tokens: int | None = None
    conversion: Conversion | None = None
    model: str = ""
    system: str = ""

    def chat_answer(self) -> ChatAnswer | None:
        """Reads the answer that is to be converted."""
        if self.conversion is None:
            return None
        known = len(self.prompt.chain) if self.prompt.in_tokens else 0
        return ChatAnswer(known, self.conversion.stops, wants_no_tokens=self.conversion.wants_no_tokens)


@dataclass(slots=True)
class ForwardedAnswer:
    """See `EndedAnswer`. response_id: the id by which the client knows the answer."""

    usage: CacheUsage = field(default_factory=lambda: CacheUsage(0, 0))
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    response_id: str = ""


class Attempt:
    """A request at one worker, from sending it until `refused` or `end`. All methods run on one event loop.

    expected: tokens of the prompt that routing expects to be cached, or in flight, at the worker. route: what
    ``x-emberkv-route`` says; route_seconds: what routing took, attempts before this one included. on_end: called with
    the attempt by `end`. recorder: of a trace; None if no trace is recorded. trace: of the request; None if there is no
    tracer.
    """

    def __init__(
        self,
        worker: ForeignWorker,
        request: ForwardedRequest,
        expected: int,
        answers: AnswerService,
        lifecycle: Lifecycle,
        *,
        recorder: TraceRecorder | None,
        on_end: Callable[["Attempt"], None],
        route: str = "",
        route_seconds: float = 0.0,
        trace: ForwardedTrace | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.worker = worker
        self.request = request
        self.answer = ForwardedAnswer(CacheUsage(len(request.prompt.chain), 0))
        self._answers = answers
        self._lifecycle = lifecycle
        self._on_end = on_end
        self._clock = clock
        self._recorder = recorder
        self._interrupted: EmberError | None = None
        self._scope: asyncio.Timeout | None = None
        conversion = request.conversion
        self._writer = None if conversion is None else conversion.writer(request.context)
        self._timer = answers.forward(request.context)
        self._timer.route_seconds = route_seconds
        self._timer.submitted_seconds = max(0.0, self._timer.submitted_seconds - route_seconds)
        self.route = route
        self._trace = trace
        self._taken = None if recorder is None else recorder.arrived(_recorded(request))
        self._sent = worker.begin(request.context.request_id, request.prompt, expected, clock())
        lifecycle.track(self)

    @property
    def writer(self) -> MessageResponseWriter:
        """Of an answer that is converted."""
        assert self._writer is not None, "the request has a conversion"
        return self._writer

    @property
    def headers(self) -> Mapping[str, str]:
        """The client's, with the trace that the worker's spans belong to."""
        return {**self.request.headers, **(self._trace.headers if self._trace is not None else {})}

    def interrupt(self, error: EmberError) -> None:
        """Abort the request: `waiting` raises ``error``."""
        self._interrupted = error
        if self._scope is not None:
            self._scope.reschedule(0)

    @asynccontextmanager
    async def waiting(self) -> AsyncGenerator[None, None]:
        """A context for waiting on the worker. Raises WorkerTimeoutError if the worker is given up, and the error of
        `interrupt` after that was called.
        """
        try:
            async with self.worker.waiting() as self._scope:
                yield
        except ClusterError as error:
            raise self._interrupted or error from error
        finally:
            self._scope = None

    def named(self, response_id: str) -> None:
        """Record the id by which the client knows the answer: the worker's, or of a converted answer its own."""
        is_converted = self.request.conversion is not None
        self.answer.response_id = self.request.context.request_id if is_converted else response_id

    def token(self) -> None:
        """Record that a part of the answer has arrived."""
        if self._sent.begun_at is None:
            self.worker.first_token(self._sent, self._clock())
        self._timer.record(TokenOutput(self.request.context.request_id, (0,)))

    def refused(self) -> None:
        """Record that the worker gives no answer."""
        self.worker.finish(self._sent, None, self._clock())
        self._lifecycle.untrack(self)
        if self._recorder is not None and self._taken is not None:
            self._recorder.refused(self._taken)

    def end(self, usage: ReportedUsage | None, reason: FinishReason, parts: int = 0) -> None:
        """Record the end of the answer, whether it is complete or not. usage: None if the worker did not report it;
        ``parts`` then count as the answer's tokens.
        """
        self.worker.finish(self._sent, usage, self._clock())
        self._lifecycle.untrack(self)
        answer = self.answer
        answer.finish_reason = reason
        answer.completion_tokens = parts
        if usage is not None:
            answer.usage = CacheUsage(usage.prompt, usage.cached or 0)
            answer.completion_tokens = usage.completion
        if self._recorder is not None and self._taken is not None:
            self._recorder.ended_elsewhere(self._taken, reason, answer.completion_tokens)
        counted = len(self.request.prompt.chain)  # when the request was accepted, before its tokens were known
        tokens = answer.usage.prompt_tokens + answer.completion_tokens - counted
        self._answers.limits.count(self.request.context.tenant.name, tokens)
        self._answers.forwarded(self.request.context, answer, self._timer, self.summary())
        if self._trace is not None:
            self._trace.record(self.request.context, answer, self._timer, self.route)
        self._observe()
        self._on_end(self)

    def _observe(self) -> None:
        """Look for volatile lines. Text in pieces has the lines of a JSON string, which are not those of the prompt."""
        request = self.request
        explanation = self.worker.ledger.explained(request.context.request_id)
        if explanation is not None and request.prompt.in_tokens and request.system:
            tokens = request.prompt.chain.slice(0, len(request.prompt.chain))
            self._answers.observe(request.context, tokens, request.system, explanation, request.prompt.tokenizer)

    def summary(self) -> CacheSummary:
        """The cached tokens that the worker reports, and the reasons of the misses."""
        return summary_of(self.answer.usage, self.worker.ledger.explained(self.request.context.request_id))


def _recorded(request: ForwardedRequest) -> GenerationRequest:
    context = request.context
    params = SamplingParams(max_tokens=request.max_tokens or ANY_LENGTH)
    return GenerationRequest(
        context.request_id,
        request.prompt.chain.slice(0, len(request.prompt.chain)),
        params,
        context.tenant.salt,
        tenant=context.tenant.name,
        session_id=context.session,
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers. is_refusal: another worker may answer better."""

    response: Response
    is_refusal: bool = False


BUSY = (429, 502, 503, 504)
"""Statuses after which a request is sent to another worker."""

EVENT_STREAM = "text/event-stream"

_NO_CHOICES = "the worker's answer has no choices"


async def ask(attempt: Attempt, headers: Mapping[str, str], on_end: Callable[[], None]) -> Reply:
    """Send the request and wait until the answer has begun: for all of it, or for the first token of a stream.

    headers: added to the response. on_end: of a `RelayedStream`. Raises ClusterError if the worker does not answer; the
    request can then be sent to another worker.
    """
    stack = AsyncExitStack()
    request, client = attempt.request, attempt.worker.client
    try:
        async with attempt.waiting():
            response = await stack.enter_async_context(client.post(request.path, request.data, attempt.headers))
            is_stream = response.status == 200 and response.content_type == EVENT_STREAM
            if not is_stream:
                return await _whole(attempt, response, headers)
            answer = request.chat_answer()
            on_chunk = None if answer is None else answer.read_chunk
            events, early = AnswerEvents(keeps_usage=request.keeps_usage, on_chunk=on_chunk), list[bytes]()
            while not (events.has_begun or events.has_failed or events.is_done):
                data = await client.read(response)
                if not data:
                    raise WorkerLostError(f"{attempt.worker} ended its answer before the first token")
                early += events.feed(data)
            if not events.has_begun:
                return _failed_early(attempt, events, early, answer, {**answer_headers(response.headers), **headers})
            attempt.token()
            kept = stack.pop_all()
        return Reply(RelayedStream(attempt, response, events, early, kept, headers, answer, on_end))
    except ClusterError:
        attempt.worker.lost += 1
        attempt.refused()
        raise
    except BaseException:
        attempt.end(None, FinishReason.ABORT)
        raise
    finally:
        await stack.aclose()


async def _whole(attempt: Attempt, response: "aiohttp.ClientResponse", headers: Mapping[str, str]) -> Reply:
    """The reply for an answer that is not a stream, or for an error of the worker."""
    data = await attempt.worker.client.read_all(response)
    answer = decoded(data)
    usage = usage_of(answer) if response.status == 200 else None
    chat = attempt.request.chat_answer()
    fault = ""
    if response.status == 200 and chat is not None:
        chat.read_whole(answer)
        fault = chat.error or ("" if choices_of(answer) else _NO_CHOICES)
    if response.status == 200 and attempt.request.streams and not fault:
        has_ended = all(isinstance(each, dict) and each.get("finish_reason") for each in choices_of(answer))
        fault = "" if has_ended else "the worker's answer has no finish_reason"
    if response.status != 200 or fault:
        attempt.refused()
    else:
        attempt.named(str(answer.get("id") or "") if isinstance(answer, dict) else "")
        attempt.token()
        attempt.end(usage, finish_reason(_reason_of(answer)))
    known = usage is not None and usage.cached is not None
    summary = {CACHE_HEADER: str(attempt.summary())} if known else {}
    own = {**summary, **answer_headers(response.headers), **headers}
    if fault:
        attempt.worker.lost += 1
        error = answer.get("error") if isinstance(answer, dict) else None
        return Reply(_converted_error(attempt, 502, {"error": error or fault}, own), is_refusal=True)
    if response.status == 200:
        return Reply(_whole_response(attempt, data, answer, chat, own))
    is_refusal = response.status in BUSY
    if chat is None:
        return Reply(Response(data, status_code=response.status, headers=own), is_refusal)
    return Reply(_converted_error(attempt, response.status, answer, own), is_refusal)


def _whole_response(
    attempt: Attempt, data: bytes, answer: Any, chat: ChatAnswer | None, headers: Mapping[str, str]
) -> Response:
    """The response with a whole answer, which becomes a stream where the client has asked for one."""
    streams = attempt.request.streams
    if chat is not None and streams:
        events = attempt.writer.events(ChatStream(chat, _NoChunks()))
        return StreamingResponse(events, headers=_converted(headers), media_type=EVENT_STREAM)
    if chat is not None:
        return JSONResponse(attempt.writer.whole([chat]), headers=_converted(headers))
    if streams and choices_of(answer):
        chunks = as_stream(answer, keeps_usage=attempt.request.keeps_usage)
        return Response(chunks, headers=_converted(headers), media_type=EVENT_STREAM)
    return Response(data, headers=dict(headers))


class _NoChunks:
    """The chunks of an answer that was read whole."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


def _failed_early(
    attempt: Attempt,
    events: AnswerEvents,
    early: Sequence[bytes],
    answer: ChatAnswer | None,
    headers: Mapping[str, str],
) -> Reply:
    """The reply for a stream that is an error or has no answer: another worker may do better, and the client has had
    nothing yet.
    """
    attempt.worker.lost += 1
    attempt.refused()
    if answer is None and events.has_failed:
        sent = b"".join(early)
        return Reply(Response(sent if DONE in sent else sent + DONE, headers=dict(headers)), is_refusal=True)
    said = answer.error if answer is not None else ""
    return Reply(_converted_error(attempt, 502, {"error": said or _NO_CHOICES}, headers), is_refusal=True)


def _converted(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of the worker's answer without its type, which the converted one has by itself."""
    return {name: value for name, value in headers.items() if name != "content-type"}


def _converted_error(attempt: Attempt, status: int, answer: Any, headers: Mapping[str, str]) -> Response:
    """A worker's error in the words of the API that the client speaks."""
    said = answer.get("error", answer) if isinstance(answer, dict) else None
    text = said.get("message") if isinstance(said, dict) else said
    failure = HttpFailure(status, str(text or f"the worker answers with status {status}"))
    own = _converted(headers)
    if attempt.request.context.api == "messages":
        return JSONResponse(anthropic_error(failure), anthropic_status(failure), own)
    return JSONResponse(openai_error(failure), status, own)


def finish_reason(said: object) -> FinishReason:
    """A worker's ``finish_reason`` as emberkv's: "length", or for everything else "stop"."""
    return FinishReason.LENGTH if said == "length" else FinishReason.STOP


def _reason_of(answer: Any) -> object:
    """The ``finish_reason`` of the last choice, or None."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    last = choices[-1] if isinstance(choices, list) and choices else None
    return last.get("finish_reason") if isinstance(last, dict) else None


class RelayedStream(Response):
    """Relays a worker's events from the first token on, up to its last event or an error event.

    An answer that breaks off is not resumed at another worker, as the gateway does not know its tokens.

    early: the events that have arrived already. stack: closes the connection. chat: the answer that is to be converted;
    None: the events are passed on as they are. on_end: called when the answer has ended, in any case.
    """

    def __init__(
        self,
        attempt: Attempt,
        response: "aiohttp.ClientResponse",
        events: AnswerEvents,
        early: Sequence[bytes],
        stack: AsyncExitStack,
        headers: Mapping[str, str],
        chat: ChatAnswer | None,
        on_end: Callable[[], None],
    ) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._attempt = attempt
        self._response = response
        self._events = events
        self._early = early
        self._stack = stack
        self._chat = chat
        self._reason = FinishReason.ABORT
        self._has_ended = False  # the reason and the usage are final
        self._on_end: Callable[[], None] | None = on_end
        self.status_code = 200
        self.background = None
        self.init_headers({**answer_headers(response.headers), **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        finally:
            await self._stack.aclose()
            self._account()

    def _account(self) -> None:
        """Record the end of the answer, before its last event is sent: clients ask again at once. Idempotent."""
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        if self._chat is not None and self._chat.error:
            self._reason = FinishReason.ERROR
        self._attempt.named(self._events.response_id)
        self._attempt.end(self._events.usage, self._reason, self._events.parts)
        on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._relayed() if self._chat is None else self._rewritten(self._chat)) as events:
            async for event in events:
                if self._has_ended:
                    self._account()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        self._account()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _rewritten(self, chat: ChatAnswer) -> AsyncGenerator[bytes, None]:
        """The events of the API that the client speaks. Its writer makes an event of what the answer fails by."""
        async with aclosing(self._read()) as relayed:
            async for event in self._attempt.writer.events(ChatStream(chat, relayed)):
                yield event

    async def _read(self) -> AsyncGenerator[bytes, None]:
        """The worker's events. Raises EmberError where the answer does not come to its end."""
        for event in self._early:
            self._note_end()
            yield event
        try:
            async with self._attempt.waiting():
                while not self._events.is_done and (data := await self._attempt.worker.client.read(self._response)):
                    self._attempt.token()
                    for event in self._events.feed(data):
                        self._note_end()
                        yield event
            if not self._events.is_whole:  # the connection ended, or [DONE] came without a finish_reason
                raise WorkerLostError(f"{self._attempt.worker} ended its answer before it was complete")
        except EmberError:
            self._reason, self._has_ended = FinishReason.ERROR, True
            self._attempt.worker.lost += 1
            raise
        self._note_end(is_over=True)

    def _note_end(self, *, is_over: bool = False) -> None:
        """Before an event is passed on: after ``[DONE]`` nothing follows. is_over: the connection has ended, too."""
        if is_over or (self._events.is_done and self._events.is_whole):
            ended = finish_reason(self._events.finish_reason)
            self._reason, self._has_ended = FinishReason.ERROR if self._events.has_failed else ended, True

    async def _relayed(self) -> AsyncGenerator[bytes, None]:
        """The worker's events as they are, and an error event where they break off."""
        try:
            async with aclosing(self._read()) as events:
                async for event in events:
                    yield event
        except EmberError as error:
            shown = GenerationFailedError(str(error)) if isinstance(error, ClusterError) else error
            yield sse_event(openai_error(failure_mid_stream(shown)))
            yield DONE
