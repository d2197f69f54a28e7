"""One API request on its way through the server, the last requests by id, and statistics of client sessions."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.tenancy.tenants import Tenant

MAX_REMEMBERED = 2000


@dataclass(frozen=True, slots=True)
class RequestContext:
    """request_id: also its response's. http_id: of the HTTP request, as in ``X-Request-Id``. api: the metrics' label.

    arrived: when it came, by the app's clock. canonical: how many lines or tools each rule changed.
    """

    request_id: str
    api: str
    tenant: Tenant
    arrived: float
    session: str = ""
    canonical: Mapping[str, int] = field(default_factory=dict)
    http_id: str = ""

    def answer_id(self, index: int) -> str:
        """The engine's name for one of its answers."""
        return f"{self.request_id}.{index}" if index else self.request_id


class RecentRequests:
    """The last ``limit`` requests."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._asked: OrderedDict[str, RequestContext] = OrderedDict()

    def add(self, asked: RequestContext) -> None:
        self._asked[asked.request_id] = asked
        if len(self._asked) > self._limit:
            self._asked.popitem(last=False)

    def get(self, request_id: str) -> RequestContext | None:
        return self._asked.get(request_id)


HEADER = "x-session-id"
MAX_SESSIONS = 1000
MAX_ID_LENGTH = 128


@dataclass(slots=True)
class SessionStats:
    """last_seen: seconds since 1970."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    last_seen: float = 0.0


def session_id(headers: Mapping[str, str]) -> str:
    """The session that a request names; "" for none. Raises RequestError for one that is too long."""
    given = headers.get(HEADER, "")
    if len(given) > MAX_ID_LENGTH:
        raise RequestError(f"{HEADER} has {len(given)} characters; at most {MAX_ID_LENGTH} are accepted", param=HEADER)
    return given


class Sessions:
    """The figures of the last ``limit`` sessions, each tenant's apart."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._figures: OrderedDict[tuple[str, str], SessionStats] = OrderedDict()

    def __len__(self) -> int:
        return len(self._figures)

    def count(self, asked: RequestContext, usages: Sequence[CacheUsage], now: float) -> None:
        """One more request and its prompts; one that names no session is not counted."""
        if not asked.session:
            return
        key = (asked.tenant.name, asked.session)
        figures = self._figures.setdefault(key, SessionStats())
        self._figures.move_to_end(key)
        figures.requests += 1
        figures.prompt_tokens += sum(usage.prompt_tokens for usage in usages)
        figures.hit_tokens += sum(usage.cached_tokens for usage in usages)
        figures.last_seen = now
        if len(self._figures) > self._limit:
            self._figures.popitem(last=False)

    def listing(self) -> list[dict[str, object]]:
        """The latest first."""
        return [
            {"tenant": tenant, "session": session, **asdict(figures)}
            for (tenant, session), figures in reversed(self._figures.items())
        ]
