"""The HTTP application: a pure factory, all of whose dependencies are parameters."""

import time

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from emberkv.errors import EmberError
from emberkv.serving.admin.routes import cache_router
from emberkv.serving.api.anthropic_api import anthropic_router
from emberkv.serving.api.body_limit import BodyLimit
from emberkv.serving.api.failures import answer_failure, answer_nobody
from emberkv.serving.api.openai_api import openai_router
from emberkv.serving.context import ServingContext, ServingSettings
from emberkv.serving.lifecycle import Lifecycle, Phase
from emberkv.serving.metrics import Clock
from emberkv.serving.request_source import SourceCheck


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
    app = FastAPI(title="emberkv", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(
        SourceCheck, keyless=not context.tenants.by_key, allowed_origins=settings.allowed_origins
    )  # the last one added is the first to see a request
    for kind in (EmberError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_failure)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.include_router(openai_router(context))
    app.include_router(anthropic_router(context))
    app.include_router(cache_router(context))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = lifecycle.phase is Phase.READY
        body = {
            "ready": is_ready,
            "status": lifecycle.phase.value,
            "detail": lifecycle.detail,
            "warmup": lifecycle.warmup_report().as_json(),
        }
        return JSONResponse(body, status_code=200 if is_ready else 503)

    @app.get("/metrics", dependencies=[Depends(context.guard.metrics)])
    async def metrics() -> Response:
        return Response(context.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/metrics/tenants", dependencies=[Depends(context.guard.operator)])
    async def tenant_metrics() -> Response:
        return Response(context.tenant_metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return app
