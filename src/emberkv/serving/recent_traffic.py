"""Where the tokens of recent prompts came from, and how soon their answers began: by the minute and by session."""

import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from emberkv.core.events import POOL
from emberkv.engine.request import CacheUsage
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
class Turn:
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
        self._sessions: OrderedDict[tuple[str, str], deque[Turn]] = OrderedDict()

    def count(self, request: RequestContext, turn: Turn) -> None:
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
