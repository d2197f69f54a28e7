"""The HTTP application: a pure factory, all of whose dependencies are parameters."""

import time

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from emberkv import __version__
from emberkv.errors import EmberError
from emberkv.serving.admin.routes import cache_router
from emberkv.serving.answers import cache_header
from emberkv.serving.api.anthropic_api import anthropic_router
from emberkv.serving.api.openai_api import openai_router
from emberkv.serving.api.openapi import openapi_document
from emberkv.serving.api.tokenizer_api import tokenizer_router
from emberkv.serving.context import ServingContext, ServingSettings
from emberkv.serving.errors import REQUEST_ID_HEADERS, client_disconnected, error_response
from emberkv.serving.http.request_body import BodyLimit, ContentDecoding
from emberkv.serving.http.request_scope import RequestScope
from emberkv.serving.http.request_source import SourceCheck
from emberkv.serving.lifecycle import Lifecycle, Phase
from emberkv.serving.metrics.request_metrics import Clock

_PLACES = {
    "openai": ["/v1/chat/completions", "/v1/completions", "/v1/models"],
    "anthropic": ["/v1/messages", "/v1/messages/count_tokens", "/v1/models"],
    "tokenizer": ["/tokenize", "/detokenize", "/tokenizer_info"],
    "reference": ["/openapi.json"],
    "operation": ["/health", "/ready", "/metrics", "/version"],
}


def create_app(
    lifecycle: Lifecycle,
    settings: ServingSettings | None = None,
    *,
    clock: Clock = time.perf_counter,
    wall_clock: Clock = time.time,
) -> FastAPI:
    """An app that answers at once, and generates as soon as ``lifecycle.loaded`` has been called.

    clock: monotonic seconds, for latencies. wall_clock: seconds since 1970, for answers' ``created``.
    """
    settings = settings or ServingSettings()
    context = ServingContext(lifecycle, settings, clock=clock, wall_clock=wall_clock)
    app = FastAPI(title="emberkv", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(ContentDecoding, max_bytes=context.max_body_bytes)
    app.add_middleware(BodyLimit, max_bytes=context.max_body_bytes)
    app.add_middleware(SourceCheck, keyless=not context.tenants.by_key, allowed_origins=settings.allowed_origins)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[cache_header.NAME, *REQUEST_ID_HEADERS],
        )
    app.add_middleware(
        RequestScope, metrics=context.metrics.http, clock=clock, root_path=settings.root_path
    )  # the last one added is the first to see a request
    for kind in (EmberError, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    app.add_exception_handler(ClientDisconnect, client_disconnected)
    app.include_router(openai_router(context))
    app.include_router(anthropic_router(context))
    app.include_router(tokenizer_router(context))
    app.include_router(cache_router(context))

    @app.get("/")
    async def index() -> Response:
        return JSONResponse({"name": "emberkv", "status": lifecycle.phase.value, **_PLACES})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(openapi_document(app, settings.root_path))

    @app.get("/version", dependencies=[Depends(context.tenant)])
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/health")
    async def health() -> Response:
        if lifecycle.phase is Phase.FAILED:
            return JSONResponse({"status": "failed", "detail": lifecycle.detail}, status_code=503)
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = lifecycle.phase is Phase.READY
        body = {
            "ready": is_ready,
            "status": lifecycle.phase.value,
            "detail": lifecycle.detail,
            "warmup": lifecycle.warmup_report().as_json(),
            "background": lifecycle.background.as_json(),
        }
        return JSONResponse(body, status_code=200 if is_ready else 503)

    @app.get("/metrics", dependencies=[Depends(context.guard.metrics)])
    async def metrics() -> Response:
        return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/metrics/tenants", dependencies=[Depends(context.guard.operator)])
    async def tenant_metrics() -> Response:
        return Response(context.tenant_metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return app
