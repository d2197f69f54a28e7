"""One API request on its way through the server, the last requests by id, and statistics of client sessions."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.tenancy.tenants import Tenant

SESSION_HEADER = "x-session-id"
MAX_SESSIONS = 1000
MAX_ID_LENGTH = 128
MAX_REMEMBERED = 2000
"""Requests that are remembered by their id."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known about an API request beside its prompts.

    request_id: the response has the same. http_id: of the HTTP request, as in ``X-Request-Id``. api: the label that
    metrics have. arrived: monotonic seconds of the app's clock. created: seconds since 1970. canonical: how many lines
    or tools each canonical rule changed.
    """

    request_id: str
    api: str
    tenant: Tenant
    arrived: float
    session: str = ""
    canonical: Mapping[str, int] = field(default_factory=dict)
    http_id: str = ""
    created: int = 0

    def answer_id(self, index: int) -> str:
        """The request id that the engine has for one of the answers."""
        return f"{self.request_id}.{index}" if index else self.request_id


class RecentRequests:
    """The last ``limit`` requests, by their id."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._requests: OrderedDict[str, RequestContext] = OrderedDict()

    def add(self, request: RequestContext) -> None:
        self._requests[request.request_id] = request
        if len(self._requests) > self._limit:
            self._requests.popitem(last=False)

    def get(self, request_id: str) -> RequestContext | None:
        return self._requests.get(request_id)


@dataclass(slots=True)
class SessionStats:
    """last_seen: seconds since 1970."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    last_seen: float = 0.0


def session_id(headers: Mapping[str, str]) -> str:
    """The session id in a request's headers, "" without one. Raises RequestError for one that is too long."""
    given = headers.get(SESSION_HEADER, "")
    if len(given) > MAX_ID_LENGTH:
        raise RequestError(
            f"{SESSION_HEADER} has {len(given)} characters; at most {MAX_ID_LENGTH} are accepted", param=SESSION_HEADER
        )
    return given


class Sessions:
    """Statistics of the last ``limit`` sessions, kept for each tenant separately."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._stats: OrderedDict[tuple[str, str], SessionStats] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stats)

    def count(self, request: RequestContext, usages: Sequence[CacheUsage], now: float) -> None:
        """Count a request and the usage of its prompts; a request without a session id is not counted."""
        if not request.session:
            return
        key = (request.tenant.name, request.session)
        stats = self._stats.setdefault(key, SessionStats())
        self._stats.move_to_end(key)
        stats.requests += 1
        stats.prompt_tokens += sum(usage.prompt_tokens for usage in usages)
        stats.hit_tokens += sum(usage.cached_tokens for usage in usages)
        stats.last_seen = now
        if len(self._stats) > self._limit:
            self._stats.popitem(last=False)

    def listing(self) -> list[dict[str, object]]:
        """The latest first."""
        return [
            {"tenant": tenant, "session": session, **asdict(stats)}
            for (tenant, session), stats in reversed(self._stats.items())
        ]
