"""Sessions: what the requests that name one (``X-Session-Id``) have asked and reused. Statistics only."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.admin.asked import Asked

HEADER = "x-session-id"
MAX_SESSIONS = 1000
MAX_ID_LENGTH = 128


@dataclass(slots=True)
class SessionFigures:
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
        self._figures: OrderedDict[tuple[str, str], SessionFigures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._figures)

    def count(self, asked: Asked, usages: Sequence[CacheUsage], now: float) -> None:
        """One more request and its prompts; one that names no session is not counted."""
        if not asked.session:
            return
        key = (asked.tenant.name, asked.session)
        figures = self._figures.setdefault(key, SessionFigures())
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
