"""The dashboard: one self-contained page, and what it shows, which is the operator's to see."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from emberkv.core.events import POOL
from emberkv.engine.request import EngineStats
from emberkv.serving.auth import AdminGuard
from emberkv.serving.cache.volatile_lines import VolatileLines
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.recent_traffic import COMPUTED, RecentTraffic


def dashboard_router(
    lifecycle: Lifecycle,
    guard: AdminGuard,
    traffic: RecentTraffic,
    wall_clock: Callable[[], float],
    workers: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
    volatile_lines: VolatileLines | None = None,
) -> APIRouter:
    """``/dashboard``, the page, and ``/v1/cache/dashboard``, its data. workers: a gateway's, as ``/v1/cluster`` lists
    them; None of a server. volatile_lines: a server's, for which rules are suggested.
    """
    router = APIRouter()
    page = files("emberkv.serving").joinpath("dashboard.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": content_policy(page), "cache-control": "no-cache"}

    @router.get("/dashboard")
    async def dashboard() -> Response:
        return HTMLResponse(page, headers=headers)

    @router.get("/v1/cache/dashboard")
    async def data(http: Request) -> Response:
        await guard.operator(http)
        now, stats = wall_clock(), lifecycle.engine_stats() or EngineStats()
        reuse = lifecycle.reuse()
        body = {
            "model": lifecycle.about().get("model", "emberkv"),
            "kind": "server" if workers is None else "gateway",
            "status": lifecycle.phase.value,
            "requests": {"running": stats.running, "waiting": stats.waiting},
            "sources": _sources(traffic, stats),
            "tokens": traffic.tokens,
            "ttft": traffic.times(now),
            "memory": _memory(stats),
            "other_sizes": [] if reuse is None else reuse.figures(),
            "sessions": traffic.sessions(),
            "suggestions": [] if volatile_lines is None else [each.as_json() for each in volatile_lines.suggestions()],
            "workers": [] if workers is None else workers(),
            "history": traffic.history(now),
        }
        return JSONResponse(body)

    return router


def content_policy(page: str) -> str:
    """A Content-Security-Policy that lets the page run its own script and style, and ask its own server, only."""

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return b64encode(sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def _sources(traffic: RecentTraffic, stats: EngineStats) -> list[str]:
    """The fastest first; computed tokens last."""
    known = [POOL, *stats.tiers]
    return [*known, *(source for source in traffic.tokens if source not in (*known, COMPUTED)), COMPUTED]


def _memory(stats: EngineStats) -> list[dict[str, Any]]:
    used = stats.total_blocks - stats.free_blocks + stats.cached_blocks
    pool = {
        "tier": POOL,
        "held": used * stats.block_bytes,
        "limit": stats.total_blocks * stats.block_bytes,
        "by_tenant": stats.pool_bytes_by_owner,
    }
    tiers = [
        {"tier": name, "held": tier.bytes, "limit": tier.max_bytes, "by_tenant": tier.bytes_by_owner}
        for name, tier in stats.tiers.items()
    ]
    return [pool, *tiers] if stats.total_blocks else tiers
