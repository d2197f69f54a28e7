"""The OpenAI routes of a gateway with foreign workers: the routing policy chooses a worker for each request."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from emberkv.cluster.cache_routes import estimate_json
from emberkv.cluster.cluster_engine import MAX_LOSSES, ClusterEngine, Route, route_header
from emberkv.cluster.foreign.answers import decoded
from emberkv.cluster.foreign.conversion import CHAT_PATH, convert, prompt_body
from emberkv.cluster.foreign.fleet import ForeignFleet
from emberkv.cluster.foreign.forward import Attempt, ForwardedRequest, RelayedStream, ask
from emberkv.cluster.foreign.late_stream import LateStream
from emberkv.cluster.foreign.prompts import PromptReader, RoutedPrompt, canonical_body, objects
from emberkv.cluster.foreign.worker import ForeignWorker
from emberkv.cluster.membership import Membership
from emberkv.cluster.policies import Decision
from emberkv.cluster.routing import RoutingRequest
from emberkv.cluster.workers import RoutedWorker
from emberkv.core.explaining.explanation import Explanation
from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import ClusterError, EmberError, RequestError, WorkerLostError
from emberkv.serving.admission import ConcurrencyLimit, TenantLimits
from emberkv.serving.answer_service import LEFT_OUT_HEADER, ROUTE_HEADER, counts_header
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.cache_api import CacheRoutes, tenant_meant
from emberkv.serving.api.conversation import Conversation
from emberkv.serving.api.openai_api import openai_card
from emberkv.serving.api.responses_api import unstored_chat
from emberkv.serving.api.validation import Json, parse_body
from emberkv.serving.app import AppParts
from emberkv.serving.cache.service import Explained, explanation_json
from emberkv.serving.errors import (
    CLIENT_GONE,
    GenerationFailedError,
    NotFoundError,
    NotReadyError,
    UnknownModelError,
    speaks_anthropic,
)
from emberkv.serving.event_stream import compact_json, unless_disconnected
from emberkv.serving.tenancy import Tenant
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.tracing import ForwardedTrace

MAX_REMEMBERED = 2000
"""Recent answers that can be explained by their ``response_id``."""

_OTHERS = ("/tokenize", "/detokenize")
_CONVERTED = ("messages", "responses")
"""APIs whose requests reach foreign workers as chat completions."""

ELSEWHERE = "emberkv.not_forwarded"
"""The key in an ASGI scope that marks a request as passed on to the other routes."""

Own = tuple[Tokenizer, ClusterEngine]


class ForeignRoutes(CacheRoutes):
    """The routes of chats, completions, models and explain. Requests for emberkv workers are passed on, unchanged, to
    the other routes of the app.

    engine: of the emberkv workers; None before one of them was reached. in_flight: bounds how many requests there are
    at once, with those of the engine. recorder: of a trace; None if no trace is recorded. clock: monotonic seconds.
    """

    def __init__(
        self,
        parts: AppParts,
        membership: Membership,
        fleet: ForeignFleet,
        reader: PromptReader,
        engine: Callable[[], ClusterEngine | None],
        *,
        in_flight: ConcurrencyLimit,
        recorder: TraceRecorder | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(parts.lifecycle, parts.guard, parts.tenants, parts.preparer, parts.answers, parts.wall_clock)
        self._membership = membership
        self._fleet = fleet
        self._reader = reader
        self._engine = engine
        self._keys = parts.keys
        self._responses = parts.responses
        self._times = parts.stream_times
        self._in_flight = in_flight
        self._recorder = recorder
        self._clock = clock
        self._forwarded: OrderedDict[str, tuple[str, Tenant, RoutedPrompt, ForeignWorker]] = OrderedDict()

    def router(self) -> APIRouter:
        router = APIRouter(route_class=_ForeignRoute)
        guard = Depends(self._keys.tenant)

        @router.post("/v1/chat/completions")
        async def chat_completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
            return await self._answer(http, tenant, "chat_completions")

        @router.post("/v1/completions")
        async def completions(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
            return await self._answer(http, tenant, "completions")

        @router.post("/v1/messages")
        async def messages(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
            return await self._answer(http, tenant, "messages")

        @router.post("/v1/responses")
        async def responses(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
            return await self._answer(http, tenant, "responses")

        @router.post("/v1/messages/count_tokens")
        async def count_tokens(http: Request, tenant: Annotated[Tenant, guard]) -> Response:
            return await self._count_tokens(http, tenant)

        @router.get("/v1/models", dependencies=[guard])
        async def models(http: Request) -> Response:
            if speaks_anthropic(http) and self._lifecycle.has_model:
                return _ByOtherRoutes(b"")
            return JSONResponse({"object": "list", "data": list(self._cards().values())})

        @router.get("/v1/models/{name:path}", dependencies=[guard])
        async def card(name: str, http: Request) -> Response:
            cards = self._cards()
            if self._lifecycle.has_model and (speaks_anthropic(http) or name not in cards):
                return _ByOtherRoutes(b"")
            if name not in cards:
                raise self._unknown(name)
            return JSONResponse(cards[name])

        for path in _OTHERS:
            router.add_api_route(path, self._other, methods=["POST"], include_in_schema=False)
        router.add_api_route("/v1/cache/explain", self.explain, methods=["POST"])
        return router

    async def _other(self, http: Request) -> Response:
        """Pass on a route that only emberkv workers have. Raises NotFoundError if there are no such workers."""
        if self._lifecycle.has_model or self._membership.workers:
            return _ByOtherRoutes(await http.body())
        raise NotFoundError(
            f"this gateway does not support {http.url.path}, as it has only foreign workers; use "
            "/v1/chat/completions, /v1/completions, /v1/messages or /v1/responses"
        )

    async def _count_tokens(self, http: Request, tenant: Tenant) -> Response:
        """Count a prompt's tokens by the tokenizer that the gateway was given for foreign workers.

        Raises NotFoundError if there is none.
        """
        raw = await http.body()
        if self._lifecycle.has_model or self._membership.workers:
            return _ByOtherRoutes(raw)

        def count() -> int | None:
            body, _ = prompt_body(parse_body(PromptRequest, raw))
            prompt = self._reader.read(canonical_body(body, self._preparer.rules)[0], tenant)
            return len(prompt.chain) if prompt.in_tokens else None

        counted = await self._preparer.run(count, len(raw))
        if counted is None:
            raise NotFoundError(
                "this gateway cannot count tokens, as it does not know the model's tokenizer; start it as 'emberkv "
                "gateway MODEL --foreign-worker ...'"
            )
        return JSONResponse({"input_tokens": counted})

    async def explain(self, http: Request) -> Response:
        """Explain the misses of a prompt at the foreign worker that would get it, or of a past request."""
        tenant = await self._guard.asker(http)
        body = await http.body()
        question = await self._question(http, "openai", "anthropic", "response_id", "prefix")
        if question.response_id is not None and question.response_id in self._forwarded:
            request_id, owner, prompt, worker = self._forwarded[question.response_id]
            past = worker.ledger.explained(request_id)
            if past is not None and (tenant is None or tenant.name == owner.name):
                return JSONResponse(self._explained(past, prompt, worker))
        foreign = [] if question.openai is None else self._serving(question.openai.get("model"))
        if not foreign:
            return _ByOtherRoutes(body)
        assert question.openai is not None, "only then there are foreign workers for it"
        whose = tenant if tenant is not None else tenant_meant(question, self._tenants)
        asked = question.openai
        if "input" in asked:
            asked = decoded(unstored_chat(compact_json({"model": "any", **asked}).encode(), whose))
        return await self._explain(asked, whose.salted(question.cache_salt), foreign, body)

    async def _explain(self, asked: Json, tenant: Tenant, foreign: Sequence[ForeignWorker], body: bytes) -> Response:
        own = self._own(asked.get("model"))
        rewritten, canonical = canonical_body(asked, self._preparer.rules)
        prompt = await self._preparer.run(partial(self._reader.read, rewritten, tenant, own), len(body))
        candidates: list[RoutedWorker] = [*foreign, *(self._membership.up if own is not None else ())]
        found = self._membership.choose(self._routing(prompt, ""), candidates, lambda _: False)
        if found is None:
            raise NotReadyError("no worker is up; send it again later")
        worker, decision = found
        if not isinstance(worker, ForeignWorker):
            return _ByOtherRoutes(body)
        answer = self._explained(worker.explain(prompt), prompt, worker)
        workers = [_estimate_json(each, decision) for each in candidates]
        return JSONResponse({**answer, "canonical": dict(canonical), "why": decision.reason.value, "workers": workers})

    def _explained(self, explanation: Explanation, prompt: RoutedPrompt, worker: ForeignWorker) -> dict[str, Any]:
        answer = explanation_json(Explained(explanation), prompt.tokenizer, now=self._wall_clock())
        if self._tenants.names:  # the worker's cache has the texts of all tenants
            answer["divergence"] = answer["divergence"] and {**answer["divergence"], "expected": ""}
        unit = "tokens" if prompt.in_tokens else "four bytes of text"
        return {**answer, "worker": worker.worker_id, "index": worker.index, "unit": unit}

    async def _answer(self, http: Request, tenant: Tenant, api: str) -> Response:
        raw = await http.body()
        body = await self._preparer.run(partial(decoded, raw), len(raw))
        model = body.get("model") if isinstance(body, dict) else None
        foreign = self._serving(model)
        if not isinstance(body, dict) or not foreign:
            return self._not_forwarded(model, raw)
        own = self._own(model)
        if own is not None and api in _CONVERTED:  # emberkv workers have these APIs themselves
            return _ByOtherRoutes(raw)
        self._lifecycle.check_accepting()
        accepted = _Accepted(tenant.name, self._in_flight, self._answers.limits)
        try:
            work = partial(self._read, http, tenant, api, body, raw, own)
            request = await self._preparer.run(work, len(raw))
            candidates: list[RoutedWorker] = [*foreign, *(self._membership.up if own is not None else ())]
            begin = partial(self._forward, request, candidates, raw, accepted)
            if request.streams:
                return LateStream(begin, api, self._times, accepted.leave)
            begun = await unless_disconnected(http.receive, begin())
        except BaseException:
            accepted.leave()
            raise
        if not isinstance(begun, RelayedStream):  # servers also stream where "stream" is not a boolean, as 1
            accepted.leave()
        return begun or Response(status_code=CLIENT_GONE)

    def _read(
        self, http: Request, tenant: Tenant, api: str, body: Json, raw: bytes, own: Own | None
    ) -> ForwardedRequest:
        """The request as it is forwarded: a conversion to a chat completion, or unchanged except for canonical rules
        and ``include_usage`` of streams. Raises RequestError for one that cannot be converted.
        """
        conversion = convert(api, raw, tenant, self._responses) if api in _CONVERTED else None
        if conversion is not None:
            body = {**conversion.chat, "stream": conversion.streams}
        asked, canonical = canonical_body(body, self._preparer.rules)
        options = asked.get("stream_options")
        keeps_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        streams = asked.get("stream") is True
        if streams and not keeps_usage and (options is None or isinstance(options, dict)):
            asked = {**asked, "stream_options": {**(options or {}), "include_usage": True}}
        salt = asked.get("cache_salt")
        context = self._answers.request(
            http,
            api,
            tenant.salted(salt if isinstance(salt, str) else None),
            canonical,
            user_id=conversion.user_id if conversion is not None else "",
            left_out=conversion.left_out if conversion is not None else None,
        )
        limits = (asked.get("max_completion_tokens"), asked.get("max_tokens"))
        return ForwardedRequest(
            context,
            CHAT_PATH if conversion is not None else http.url.path,
            raw if asked is body and conversion is None else compact_json(asked).encode(),
            http.headers,
            self._reader.read(asked, tenant, own),
            streams,
            keeps_usage,
            next((limit for limit in limits if type(limit) is int and limit > 0), None),
            conversion,
            str(asked.get("model") or ""),
            Conversation(objects(asked.get("messages")) or ()).system_text,
        )

    async def _forward(
        self, request: ForwardedRequest, candidates: Sequence[RoutedWorker], raw: bytes, accepted: "_Accepted"
    ) -> Response:
        """Try one worker after the other until one has begun an answer.

        If all that are left refuse it (`Reply`), the last refusal is the response. Raises RateLimitedError if the
        tenant has reached a limit, GenerationFailedError if it has lost `MAX_LOSSES` workers in turn, and NotReadyError
        if no worker begins an answer.
        """
        left, refusal, failure, retried, losses, trace = list(candidates), None, None, 0, 0, None
        begun_at = self._clock()
        kinds = request.context.left_out
        left_out = {LEFT_OUT_HEADER: counts_header(kinds)} if kinds else {}
        while True:
            found = self._membership.choose(
                self._routing(request.prompt, request.context.session),
                left,
                lambda each: isinstance(each, ForeignWorker),
            )
            if found is None:
                if trace is not None:
                    trace.failed()
                if refusal is not None:
                    return refusal
                raise _no_answer(failure, losses)
            worker, decision = found
            left.remove(worker)
            if not isinstance(worker, ForeignWorker):
                accepted.leave()  # it counts again on the route that answers it, and is traced there
                if trace is not None:
                    trace.failed()
                return _ByOtherRoutes(raw)
            accepted.count(len(request.prompt.chain))
            if trace is None:
                trace = self._answers.begin_trace(request.context, request.model)
            route = Route([worker.worker_id], decision, decision.cached_by_tier, retried)
            attempt = self._attempt(worker, request, route, self._clock() - begun_at, trace)
            try:
                reply = await ask(attempt, {ROUTE_HEADER: attempt.route, **left_out}, accepted.leave)
            except ClusterError as error:
                failure = error
                self._fleet.suspect(worker, error)
                losses += isinstance(error, WorkerLostError)
                if losses >= MAX_LOSSES:  # it may be what ends their connections
                    left.clear()
            else:
                if not reply.is_refusal:
                    if trace is not None and reply.response.status_code != 200:
                        trace.failed()
                    return reply.response
                refusal = reply.response
            retried += 1

    def _attempt(
        self,
        worker: ForeignWorker,
        request: ForwardedRequest,
        route: Route,
        seconds: float,
        trace: ForwardedTrace | None,
    ) -> Attempt:
        """Send the request to a worker. seconds: since routing began."""
        return Attempt(
            worker,
            request,
            sum(route.cached.values()),
            self._answers,
            self._lifecycle,
            recorder=self._recorder,
            on_end=self._remember,
            route=route_header(route),
            route_seconds=seconds,
            trace=trace,
        )

    def _remember(self, attempt: Attempt) -> None:
        context, response_id = attempt.request.context, attempt.answer.response_id
        if response_id:
            self._forwarded[response_id] = (
                context.request_id, context.tenant, attempt.request.prompt, attempt.worker
            )  # fmt: skip
            if len(self._forwarded) > MAX_REMEMBERED:
                self._forwarded.popitem(last=False)

    def _not_forwarded(self, model: object, raw: bytes) -> Response:
        """The response for a model that no foreign worker serves: the emberkv workers' one, if there are any.

        Raises RequestError for an invalid body, and else NotReadyError or UnknownModelError.
        """
        if self._lifecycle.has_model:
            return _ByOtherRoutes(raw)
        if not isinstance(decoded(raw), dict):
            raise RequestError("the body is not a JSON object")
        if self._fleet.up and not any(worker.serves(model) for worker in self._fleet.workers):
            raise self._unknown(model)
        raise NotReadyError("no worker that serves the model is up; send it again later")

    def _unknown(self, model: object) -> UnknownModelError:
        known = sorted({name for worker in self._fleet.workers for name in worker.models})
        served = ", ".join(map(repr, known)) or "none"
        return UnknownModelError(f"model is {model!r}; this gateway's workers have {served}", param="model")

    def _serving(self, model: object) -> list[ForeignWorker]:
        return [worker for worker in self._fleet.up if worker.serves(model)]

    def _own(self, model: object) -> Own | None:
        """The tokenizer and engine of the emberkv workers if they serve the model, else None."""
        engine = self._engine()
        if engine is None or not self._lifecycle.has_model or not self._membership.up:
            return None
        served = self._lifecycle.model()
        try:
            served.check_name(model if isinstance(model, str) else served.names[0])
        except UnknownModelError:
            return None
        return served.tokenizer, engine

    def _routing(self, prompt: RoutedPrompt, session: str) -> RoutingRequest:
        return RoutingRequest(prompt.chain, len(prompt.chain), session, self._clock())

    def _cards(self) -> dict[str, dict[str, Any]]:
        """The cards of all models that can be requested, by id."""
        model = self._lifecycle.model() if self._lifecycle.has_model else None
        own = {} if model is None else {name: openai_card(model, name) for name in model.names}
        return {**self._fleet.models, **own}


class _Accepted:
    """What a request counts as, from its arrival until `leave`. Raises TooManyRequestsError if there are too many."""

    def __init__(self, tenant: str, in_flight: ConcurrencyLimit, limits: TenantLimits) -> None:
        self._tenant = tenant
        self._in_flight = in_flight
        self._limits = limits
        self._is_counted = self._has_left = False
        in_flight.enter(tenant, 1)

    def count(self, tokens: int) -> None:
        """Count the request once against its tenant's limits, as one that a foreign worker gets; those of emberkv's
        workers are counted where these are asked. Raises RateLimitedError.
        """
        if not self._is_counted:
            self._limits.enter(self._tenant)
            self._limits.count(self._tenant, tokens)
            self._is_counted = True

    def leave(self) -> None:
        """The request has ended. Idempotent."""
        if self._has_left:
            return
        self._has_left = True
        self._in_flight.leave(self._tenant, 1)
        if self._is_counted:
            self._limits.leave(self._tenant)


def _no_answer(failure: ClusterError | None, losses: int) -> EmberError:
    """The error for a request that no worker has begun to answer. failure: of the last worker that was asked."""
    if losses >= MAX_LOSSES:
        return GenerationFailedError(f"{losses} workers in turn did not begin the answer ({failure})")
    reason = "" if failure is None else f" ({failure})"
    return NotReadyError(f"no worker that serves the model answers{reason}; send it again later")


def _estimate_json(worker: RoutedWorker, decision: Decision) -> dict[str, Any]:
    estimate = estimate_json(worker, decision)
    cached = None if estimate is None else sum(estimate["cached_tokens"].values())
    return {"worker": worker.worker_id, "index": worker.index, "hit_tokens": cached, "estimate": estimate}


class _ForeignRoute(APIRoute):
    """A route that matches no request that was passed on."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.NONE, {}) if scope.get(ELSEWHERE) else super().matches(scope)


class _ByOtherRoutes(Response):
    """Passes the request on to the other routes of the app. body: the request's body, which has been read."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await scope["app"].router({**scope, ELSEWHERE: True}, again, send)
