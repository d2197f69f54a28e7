"""One API request: its context on the way through the server, what its response and its log line say of the cache, and
statistics of client sessions.

A log record has its values as ``fields``, which `JsonFormatter` writes out; no prompt text is ever logged.
"""

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from textwrap import TextWrapper
from typing import Any, Protocol

from emberkv.core.events import POOL
from emberkv.core.explaining.explanation import Explanation, MissReason
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError
from emberkv.serving.metrics import AnswerTimer
from emberkv.serving.tenancy import Tenant

SESSION_HEADER = "x-session-id"
_AGENT_HEADERS = (
    ("x-claude-code-session-id", "x-claude-code-agent-id"),  # Claude Code; the agent is one that the session started
    ("session-id", ""),  # Codex
    ("session_id", ""),  # Codex before it used hyphens
)
"""Headers by which coding agents name their session, and within it an agent whose conversation is another one."""
_SESSION_IN_USER_ID = re.compile(r"_session_([0-9A-Fa-f-]{8,64})\Z|\"session_id\"\s*:\s*\"([^\"\\]{1,128})\"")
MAX_SESSIONS = 1000
MAX_ID_LENGTH = 128
MAX_REMEMBERED = 2000
"""Requests that are remembered by their id."""

ID_BYTES = 16
IDS_AT_ONCE = 256

_ids: list[str] = []


def random_id() -> str:
    """A new id of 128 random bits, in hexadecimal.

    The system's randomness is read for many ids at once: each reading gives up the interpreter's lock, which the
    engine's thread may then hold for milliseconds.
    """
    while True:
        try:
            return _ids.pop()
        except IndexError:
            drawn = os.urandom(ID_BYTES * IDS_AT_ONCE).hex()
            _ids.extend(drawn[at : at + 2 * ID_BYTES] for at in range(0, len(drawn), 2 * ID_BYTES))


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known about an API request beside its prompts.

    request_id: the response has the same. http_id: of the HTTP request, as in ``X-Request-Id``. api: the label that
    metrics have. arrived: monotonic seconds of the app's clock. created: seconds since 1970. canonical: how many lines
    or tools each canonical rule changed. left_out: how many parts of the request are not in the prompt, by type.
    inferred_session: what statistics call its session where ``session``, which the client gives, is "". worker,
    seq_id: see `GenerationRequest`. traceparent: W3C trace context that the client sent.
    """

    request_id: str
    api: str
    tenant: Tenant
    arrived: float
    session: str = ""
    canonical: Mapping[str, int] = field(default_factory=dict)
    http_id: str = ""
    created: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    worker: str = ""
    seq_id: str = ""
    traceparent: str = ""
    inferred_session: str = ""

    @property
    def counted_session(self) -> str:
        """The session in statistics; "" if the request is in none."""
        return self.session or self.inferred_session

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


def session_id(headers: Mapping[str, str], user_id: str = "") -> str:
    """The id of the session that a request belongs to, "" where nothing says so.

    The header ``x-session-id`` counts before those of `_AGENT_HEADERS`, and these before user_id: the
    ``metadata.user_id`` of an Anthropic request, in which Claude Code names its session. An agent's id that is too
    long is replaced by a digest, because its user cannot change it.

    >>> session_id({"x-claude-code-session-id": "5f0c", "x-claude-code-agent-id": "explore"})
    '5f0c/explore'

    Raises RequestError for an ``x-session-id`` that is too long.
    """
    given = headers.get(SESSION_HEADER, "")
    if len(given) > MAX_ID_LENGTH:
        raise RequestError(
            f"{SESSION_HEADER} has {len(given)} characters; at most {MAX_ID_LENGTH} are accepted", param=SESSION_HEADER
        )
    return given or _shortened(_agent_session(headers) or _session_of_user_id(user_id))


def _agent_session(headers: Mapping[str, str]) -> str:
    for name, agent_header in _AGENT_HEADERS:
        if session := headers.get(name, ""):
            agent = headers.get(agent_header, "")
            return f"{session}/{agent}" if agent else session
    return ""


def _session_of_user_id(user_id: str) -> str:
    """The session that Claude Code writes into a user id; without one, the user's requests count as one session."""
    found = _SESSION_IN_USER_ID.search(user_id)
    return user_id if found is None else found[1] or found[2]


def _shortened(session: str) -> str:
    return session if len(session) <= MAX_ID_LENGTH else sha256(session.encode()).hexdigest()[:32]


class RecentSessions:
    """Statistics of the last ``limit`` sessions, kept for each tenant separately."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._stats: OrderedDict[tuple[str, str], SessionStats] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stats)

    def count(self, request: RequestContext, usages: Sequence[CacheUsage], now: float) -> None:
        """Count a request and the usage of its prompts; a request without a session id is not counted."""
        if not request.counted_session:
            return
        key = (request.tenant.name, request.counted_session)
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


CACHE_HEADER = "x-emberkv-cache"

_CACHE_HEADER_PATTERN = re.compile(
    r"hit=(?P<hit>\d+)(?P<tiers>(?:;[a-z][a-z0-9-]*=\d+)*?);miss=(?P<miss>\d+)"
    r"(?:;why=(?P<why>[a-z-]+)@(?P<at>\d+))?"
)


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What the header says: tokens found in all, by tier (the pool included), and missed.

    at: the prompt's first token that ``why`` is for.
    """

    hit: int
    by_tier: Mapping[str, int]
    miss: int
    why: MissReason | None = None
    at: int = 0

    def __str__(self) -> str:
        pairs = [f"hit={self.hit}", *(f"{tier}={tokens}" for tier, tokens in self.by_tier.items())]
        pairs.append(f"miss={self.miss}")
        if self.why is not None:
            pairs.append(f"why={self.why.value}@{self.at}")
        return ";".join(pairs)


def summary_of(usage: CacheUsage, explanation: Explanation | None) -> CacheSummary:
    """Tokens are those that the API counts; the explanation says why the rest is missed.

    A divergence is placed at the very token that differs.
    """
    pool = usage.cached_tokens - sum(usage.tokens_by_tier.values())
    by_tier = {POOL: pool, **usage.tokens_by_tier} if pool else usage.tokens_by_tier
    dominant = None if explanation is None else explanation.dominant
    if explanation is None or dominant is None:
        return CacheSummary(usage.cached_tokens, by_tier, usage.computed_tokens)
    diverged = explanation.divergence if dominant.reason is MissReason.DIVERGED else None
    at = dominant.start if diverged is None else diverged.position
    return CacheSummary(usage.cached_tokens, by_tier, usage.computed_tokens, dominant.reason, at)


def parse_summary(header: str) -> CacheSummary:
    """Raises RequestError for a text that is no such header."""
    match = _CACHE_HEADER_PATTERN.fullmatch(header)
    if match is None or (match["why"] and match["why"] not in {reason.value for reason in MissReason}):
        raise RequestError(
            f"{CACHE_HEADER} is {header!r}; it must be like 'hit=32;pool=32;miss=5;why=new@32'", param=CACHE_HEADER
        )
    pairs = (pair.split("=") for pair in match["tiers"].split(";")[1:])
    by_tier = {tier: int(tokens) for tier, tokens in pairs}
    why = MissReason(match["why"]) if match["why"] else None
    return CacheSummary(int(match["hit"]), by_tier, int(match["miss"]), why, int(match["at"] or 0))


logger = logging.getLogger("emberkv.requests")

_SHORT_NAMES = {"chat_completions": "chat", "completions": "text"}
_ORDINARY_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


class EndedAnswer(Protocol):
    """What is accounted for of an answer, wherever it was made."""

    usage: CacheUsage
    completion_tokens: int
    finish_reason: FinishReason | None


def log_finished(
    request: RequestContext, request_id: str, answer: EndedAnswer, timer: AnswerTimer, summary: CacheSummary
) -> None:
    """Log one answer. No text of prompts and answers is logged; names that clients give are cut to plain letters."""
    seconds = timer.first_token_seconds
    finish = answer.finish_reason or FinishReason.ABORT
    fields = {
        "request": request_id,
        "request_id": request.http_id,
        "api": request.api,
        "tenant": request.tenant.name,
        "finish": finish.value,
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": answer.usage.cached_tokens,
        "completion_tokens": answer.completion_tokens,
        "cache": str(summary),
        "first_token_seconds": seconds and round(seconds, 4),
        "total_seconds": round(timer.total_seconds, 4),
        "canonical": dict(request.canonical),
        "left_out": dict(request.left_out),
    }
    prompt, cached = answer.usage.prompt_tokens, answer.usage.cached_tokens
    parts = [
        _SHORT_NAMES.get(request.api, request.api),
        f"{prompt:,} prompt, {cached:,} cached ({percent(cached, prompt)})",
        f"{answer.completion_tokens:,} out",
        f"ttft {duration(seconds)}" if seconds is not None else "",
        "" if finish in _ORDINARY_ENDS else finish.value,
        request.tenant.name,
    ]
    logger.info("%s", "  ".join(filter(None, parts)), extra={"fields": fields})


def log_refused(
    *, request_id: str, method: str, path: str, status: int, code: str | None, param: str | None, seconds: float
) -> None:
    """Log a request that was answered with an error, or whose client left before it was answered.

    path: its route's template, where it has one. The error's message is left out, as it may repeat what was sent.
    """
    fields = {
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "code": code,
        "param": param,
        "seconds": round(seconds, 4),
    }
    what = " ".join(filter(None, (code, param)))
    parts = (str(status), f"{method} {path}", what, request_id)
    level = logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "%s", "  ".join(filter(None, parts)), extra={"fields": fields})


def percent(part: int, whole: int) -> str:
    """A share with one decimal, rounded down, so that only all of it is 100%."""
    return f"{1000 * part // whole / 10 if whole else 0.0:.1f}%"


def duration(seconds: float) -> str:
    """In milliseconds below ten seconds, in seconds from there on."""
    return f"{seconds * 1000:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line.update(fields if isinstance(fields, dict) else {"message": record.getMessage()})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A log record as text. For a terminal: the time of day, the level only where it is not the ordinary one, and
    lines that break between words.

    columns: of the terminal; None: the log goes elsewhere.
    """

    def __init__(self, columns: Callable[[], int] | None = None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        if columns is not None:
            self.datefmt = "%H:%M:%S"
        self._columns = columns

    def formatMessage(self, record: logging.LogRecord) -> str:
        if self._columns is None:
            return super().formatMessage(record)
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        wrapper = TextWrapper(break_long_words=False, break_on_hyphens=False)
        wrapper.subsequent_indent = " " * (len(record.asctime) + 1)
        wrapper.width = max(self._columns(), 2 * len(wrapper.subsequent_indent))
        lines = f"{record.asctime} {level}{record.message}".split("\n")
        return "\n".join(wrapper.fill(line) for line in lines)
