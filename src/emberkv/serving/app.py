"""The HTTP application. It is made by a pure factory, all of whose dependencies are parameters."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from emberkv import __version__
from emberkv.errors import EmberError
from emberkv.serving.answer_service import ANSWER_HEADERS, MAX_REQUESTS, AnswerService, RequestPreparer
from emberkv.serving.answers.answer_memory import AnswerMemory
from emberkv.serving.api.anthropic_api import anthropic_router
from emberkv.serving.api.cache_api import cache_router
from emberkv.serving.api.openai_api import openai_router
from emberkv.serving.api.responses_api import responses_router
from emberkv.serving.api.responses_schema import ResponseStore
from emberkv.serving.api.tokenizer_api import tokenizer_router
from emberkv.serving.auth import AdminGuard, ApiKeys, IsOwnUser, SourceCheck
from emberkv.serving.background import WorkerPool
from emberkv.serving.canonical import CanonicalRules
from emberkv.serving.dashboard import dashboard_router
from emberkv.serving.errors import REQUEST_ID_HEADERS, client_disconnected, error_response
from emberkv.serving.event_stream import StreamTimes
from emberkv.serving.lifecycle import Lifecycle, ServerPhase
from emberkv.serving.metrics import (
    AnswerMemoryCollector,
    BuildCollector,
    HttpMetrics,
    MemoryCollector,
    ReuseCollector,
    ServingMetrics,
    TierCollector,
    WarmupCollector,
)
from emberkv.serving.middleware import BodyLimit, ContentDecoding, RequestScope, default_max_bytes
from emberkv.serving.openapi import docs_page, openapi_document
from emberkv.serving.tenancy import SECRET_BYTES, Tenants
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.serving.tracing import RequestTracer


@dataclass(frozen=True)
class ServingSettings:
    """What the app of a server can be set to.

    max_body_bytes: the largest request body accepted; None: `default_max_bytes` of the model's context. tenants: those
    that may send requests; None makes a tenant of each of ``api_keys``, and without these no key is needed. canonical:
    rules that rewrite prompts before they are rendered. recorder: records every request in a trace. For admin_key,
    metrics_key, bound_to_loopback and is_own_user see `AdminGuard`. allowed_origins: of web pages that may use the API
    (`SourceCheck`); "*" is all. root_path: the path under which a proxy serves all routes. request_timeout: seconds
    from a request's arrival to the end of its answers, which are interrupted then; None: as long as they take.
    stream_times: of streams' headers and pings; None: the usual ones. max_requests: see `ConcurrencyLimit`. gateways:
    how many share the load evenly; each enforces its part of the tenants' rate limits. answer_memory: whether answers
    are remembered, see `emberkv.serving.api.splicing`. next_turn_tokens: how many tokens `NextTurns` computes in a
    minute; 0: none.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int | None = None
    tenants: Tenants | None = None
    canonical: CanonicalRules | None = None
    admin_key: str | None = None
    metrics_key: str | None = None
    recorder: TraceRecorder | None = None
    bound_to_loopback: bool = False
    is_own_user: IsOwnUser = lambda _: True
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    request_timeout: float | None = None
    stream_times: StreamTimes | None = None
    max_requests: int | None = MAX_REQUESTS
    gateways: int = 1
    tracer: RequestTracer | None = None
    answer_memory: bool = True
    next_turn_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AppParts:
    """What an app's routes are built of, for routers that are added to it. register: adds to the app's metrics."""

    lifecycle: Lifecycle
    keys: ApiKeys
    guard: AdminGuard
    preparer: RequestPreparer
    answers: AnswerService
    tenants: Tenants
    wall_clock: Callable[[], float]
    responses: ResponseStore
    stream_times: StreamTimes
    register: Callable[[Collector], None]


RouterFactory = Callable[[AppParts], APIRouter]


_ROUTES = {
    "openai": ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"],
    "anthropic": ["/v1/messages", "/v1/messages/count_tokens", "/v1/models"],
    "tokenizer": ["/tokenize", "/detokenize", "/tokenizer_info"],
    "reference": ["/docs", "/openapi.json"],
    "operation": ["/health", "/ready", "/metrics", "/version", "/dashboard"],
}


def create_app(
    lifecycle: Lifecycle,
    settings: ServingSettings | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
    routers: Sequence[RouterFactory] = (),
) -> FastAPI:
    """An app that answers at once, and generates as soon as ``lifecycle.loaded`` has been called.

    clock: monotonic seconds, for latencies. wall_clock: seconds since 1970, for answers' ``created``. routers: make
    further routes, which take precedence over the app's own.
    """
    settings = settings or ServingSettings()
    parts, metrics = _parts(lifecycle, settings, clock, wall_clock)
    app = FastAPI(title="emberkv", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_middleware(app, lifecycle, settings, metrics.http, keyless=not parts.tenants.by_key, clock=clock)
    for kind in (EmberError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    app.add_exception_handler(ClientDisconnect, client_disconnected)
    made = [router(parts) for router in routers]
    keys, guard, preparer, answers = parts.keys, parts.guard, parts.preparer, parts.answers
    made += [
        openai_router(lifecycle, keys, preparer, answers),
        anthropic_router(lifecycle, keys, preparer, answers),
        responses_router(keys, preparer, answers, parts.responses),
        tokenizer_router(lifecycle, keys, preparer),
        cache_router(lifecycle, guard, parts.tenants, preparer, answers, wall_clock),
        dashboard_router(lifecycle, guard, answers.traffic, wall_clock, volatile_lines=answers.volatile_lines),
        _status_router(lifecycle),
        _metrics_router(guard, metrics, answers),
    ]
    for router in made:
        # FastAPI would make each route of a router that it includes again, and go through routers at each request.
        app.router.routes.extend(router.routes)
    _add_descriptions(app, settings, keys)
    return app


def _parts(
    lifecycle: Lifecycle,
    settings: ServingSettings,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> tuple[AppParts, ServingMetrics]:
    """What the routes share, and the metrics that it counts in."""
    tenants = settings.tenants or Tenants(settings.api_keys, secret=os.urandom(SECRET_BYTES))
    keys = ApiKeys(tenants)
    guard = AdminGuard(
        settings.admin_key,
        metrics_key=settings.metrics_key,
        bound_to_loopback=settings.bound_to_loopback,
        tenants=tenants,
        keys=keys,
        is_own_user=settings.is_own_user,
    )
    metrics, workers = _metrics(lifecycle), WorkerPool()
    memory = AnswerMemory() if settings.answer_memory else None
    if memory is not None:
        metrics.register(AnswerMemoryCollector(memory.size))
    answers = AnswerService(
        lifecycle,
        workers,
        metrics,
        clock=clock,
        wall_clock=wall_clock,
        recorder=settings.recorder,
        request_timeout=settings.request_timeout,
        stream_times=settings.stream_times,
        max_requests=settings.max_requests,
        limits={name: limits.part(settings.gateways) for name, limits in tenants.rate_limits.items()},
        tracer=settings.tracer,
        next_turn_tokens=settings.next_turn_tokens,
    )
    preparer = RequestPreparer(lifecycle, workers, settings.canonical, memory)
    responses, times = ResponseStore(clock=clock), settings.stream_times or StreamTimes()
    parts = AppParts(
        lifecycle, keys, guard, preparer, answers, tenants, wall_clock, responses, times, register=metrics.register
    )
    return parts, metrics


def _add_descriptions(app: FastAPI, settings: ServingSettings, keys: ApiKeys) -> None:
    """The routes that describe the others, and the version's."""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(openapi_document(app, settings.root_path))

    @app.get("/docs")
    async def docs() -> Response:
        document = openapi_document(app, settings.root_path)
        return HTMLResponse(docs_page(document, f"{settings.root_path}/openapi.json"))

    @app.get("/version", dependencies=[Depends(keys.tenant)])
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _metrics(lifecycle: Lifecycle) -> ServingMetrics:
    metrics = ServingMetrics(lifecycle.engine_stats)
    metrics.register(TierCollector(lifecycle.engine_stats))
    metrics.register(BuildCollector(lifecycle.about))
    metrics.register(lifecycle.background)
    metrics.register(WarmupCollector(lifecycle.warmup_report))
    metrics.register(MemoryCollector(lifecycle.weight_bytes, lifecycle.tokenizer_cache_bytes))
    metrics.register(ReuseCollector(lifecycle.reuse))
    return metrics


def _add_middleware(
    app: FastAPI,
    lifecycle: Lifecycle,
    settings: ServingSettings,
    metrics: HttpMetrics,
    *,
    keyless: bool,
    clock: Callable[[], float],
) -> None:
    def max_body_bytes() -> int:  # before the model is loaded, the least that any model accepts
        if settings.max_body_bytes is not None:
            return settings.max_body_bytes
        return default_max_bytes(lifecycle.model().engine.context_length if lifecycle.has_model else 0)

    app.add_middleware(ContentDecoding, max_bytes=max_body_bytes)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(SourceCheck, keyless=keyless, allowed_origins=settings.allowed_origins)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[*ANSWER_HEADERS, *REQUEST_ID_HEADERS],
        )
    # the last one added is the first to see a request
    app.add_middleware(RequestScope, metrics=metrics, clock=clock, root_path=settings.root_path)


def _status_router(lifecycle: Lifecycle) -> APIRouter:
    router = APIRouter()

    @router.get("/")
    async def index() -> Response:
        return JSONResponse({"name": "emberkv", "status": lifecycle.phase.value, **_ROUTES})

    @router.get("/health")
    async def health() -> Response:
        if lifecycle.phase is ServerPhase.FAILED:
            return JSONResponse({"status": "failed", "detail": lifecycle.detail}, status_code=503)
        return JSONResponse({"status": "alive"})

    @router.get("/ready")
    async def ready() -> Response:
        is_ready = lifecycle.phase in (ServerPhase.READY, ServerPhase.IDLE)
        body = {
            "ready": is_ready,
            "status": lifecycle.phase.value,
            "detail": lifecycle.detail,
            "warmup": lifecycle.warmup_report().as_json(),
            "background": lifecycle.background.as_json(),
        }
        return JSONResponse(body, status_code=200 if is_ready else 503)

    return router


def _metrics_router(guard: AdminGuard, serving_metrics: ServingMetrics, answers: AnswerService) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", dependencies=[Depends(guard.metrics)])
    async def metrics() -> Response:
        return Response(serving_metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/metrics/tenants", dependencies=[Depends(guard.operator)])
    async def tenant_metrics() -> Response:
        return Response(answers.tenant_metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
