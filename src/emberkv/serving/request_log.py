"""The server's log: one line for each finished answer and each refused request, as text or JSON; never any prompt text.

Each record has its values as ``fields``, which `JsonFormatter` writes out; the message is for a person.
"""

import json
import logging
from typing import Any

from emberkv.core.sequence import FinishReason
from emberkv.serving.answers.answer import Answer
from emberkv.serving.answers.cache_header import CacheSummary
from emberkv.serving.metrics.request_metrics import AnswerTimer
from emberkv.serving.request_context import RequestContext

logger = logging.getLogger("emberkv.requests")

_SHORT_NAMES = {"chat_completions": "chat", "completions": "text"}
_ORDINARY_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


def log_finished(
    request: RequestContext, request_id: str, answer: Answer, timer: AnswerTimer, summary: CacheSummary
) -> None:
    """Log one answer. All that is logged is a number, or a name that the server or its operator gave."""
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
    """A log record as text. For a terminal: the time of day, and the level only where it is not the ordinary one."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        if terminal:
            self.datefmt = "%H:%M:%S"
        self._terminal = terminal

    def formatMessage(self, record: logging.LogRecord) -> str:
        if self._terminal and record.levelno == logging.INFO:
            return f"{record.asctime} {record.message}"
        return super().formatMessage(record)
