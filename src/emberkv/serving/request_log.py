"""One line for each finished request: who, how much, from where, why not, how long. Never what was said."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emberkv.engine.request import CacheUsage
from emberkv.serving.cache_header import CacheSummary

logger = logging.getLogger("emberkv.requests")


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """seconds: from arrival to the first token, where there was one, and to the end."""

    request_id: str
    api: str
    tenant: str
    finish: str
    usage: CacheUsage
    completion_tokens: int
    summary: CacheSummary
    first_token_seconds: float | None
    total_seconds: float
    canonical: Mapping[str, int] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """In the order of the line. Everything here is a number, or a name that the server or its operator gave."""
        return {
            "request": self.request_id,
            "api": self.api,
            "tenant": self.tenant,
            "finish": self.finish,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "cache": str(self.summary),
            "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 4),
            "total_seconds": round(self.total_seconds, 4),
            "canonical": dict(self.canonical),
        }


def log_finished(request: FinishedRequest) -> None:
    fields = request.fields()
    told = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, "", {}))
    logger.info("%s", told, extra={"fields": fields})


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
