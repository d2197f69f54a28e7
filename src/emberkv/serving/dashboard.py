"""The dashboard: one self-contained page for the operator, and its numbers: where the tokens of recent prompts came
from, and how soon their answers began, by the minute and by session.
"""

import statistics
from base64 import b64encode
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from emberkv.core.events import POOL
from emberkv.engine.request import CacheUsage, EngineStats
from emberkv.serving.auth import AdminGuard
from emberkv.serving.cache.volatile_lines import VolatileLines
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.request_context import RequestContext

COMPUTED = "computed"
"""The source of tokens that were in no tier."""
MINUTES = 60
RECENT_MINUTES = 10
SHOWN_SESSIONS = 12
SHOWN_TURNS = 40
_KEPT_TIMES = 500
"""Times to a first token that are kept of one minute; later ones of it are not counted."""


@dataclass(frozen=True, slots=True)
class AnsweredTurn:
    """One answered prompt. tokens: of the prompt, by where they came from. ttft: seconds; None without a token.
    at: seconds since 1970, when it ended.
    """

    id: str
    at: float
    tokens: Mapping[str, int]
    ttft: float | None


@dataclass(slots=True)
class _Minute:
    tokens: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)


class RecentTraffic:
    """Where the tokens of prompts came from, since the start, by the minute for an hour, and by session.

    Belongs to the event loop. Times are seconds since 1970.
    """

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self._minutes: OrderedDict[int, _Minute] = OrderedDict()
        self._sessions: OrderedDict[tuple[str, str], deque[AnsweredTurn]] = OrderedDict()

    def count(self, request: RequestContext, turn: AnsweredTurn) -> None:
        """Count a prompt whose answer has ended."""
        self.tokens.update(turn.tokens)
        minute = self._minutes.setdefault(int(turn.at // 60), _Minute())
        minute.tokens.update(turn.tokens)
        if turn.ttft is not None and len(minute.times) < _KEPT_TIMES:
            minute.times.append(turn.ttft)
        while len(self._minutes) > MINUTES:
            self._minutes.popitem(last=False)
        if request.counted_session:
            key = (request.tenant.name, request.counted_session)
            self._sessions.setdefault(key, deque(maxlen=SHOWN_TURNS)).append(turn)
            self._sessions.move_to_end(key)
            if len(self._sessions) > SHOWN_SESSIONS:
                self._sessions.popitem(last=False)

    def sessions(self) -> list[dict[str, Any]]:
        """The latest first."""
        return [
            {"tenant": tenant, "session": session, "turns": [asdict(turn) for turn in turns]}
            for (tenant, session), turns in reversed(self._sessions.items())
        ]

    def history(self, now: float) -> dict[str, Any]:
        """By the minute, the oldest first: prompt tokens a second by source, and quantiles of the TTFT."""
        last = int(now // 60)
        minutes = [self._minutes.get(index, _Minute()) for index in range(last - MINUTES + 1, last + 1)]
        return {
            "step": 60,
            "points": MINUTES,
            "tokens": {source: [minute.tokens[source] / 60 for minute in minutes] for source in self.tokens},
            "p50": [quantile(minute.times, 50) for minute in minutes],
            "p90": [quantile(minute.times, 90) for minute in minutes],
        }

    def times(self, now: float) -> dict[str, float | None]:
        """Quantiles of the times to a first token of the last minutes."""
        first = int(now // 60) - RECENT_MINUTES
        times = [time for index, minute in self._minutes.items() if index > first for time in minute.times]
        return {"p50": quantile(times, 50), "p90": quantile(times, 90)}


def tokens_by_source(usage: CacheUsage) -> dict[str, int]:
    """A prompt's tokens by where they came from: the pool, a lower tier, or computed."""
    pool = usage.cached_tokens - sum(usage.tokens_by_tier.values())
    amounts = ((POOL, pool), *usage.tokens_by_tier.items(), (COMPUTED, usage.computed_tokens))
    return {source: tokens for source, tokens in amounts if tokens}


def quantile(values: Sequence[float], percent: int) -> float | None:
    """None of none.

    >>> quantile([3.0, 1.0, 2.0], 50)
    2.0
    """
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


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
            "other_sizes": [] if reuse is None else reuse.as_json(),
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
