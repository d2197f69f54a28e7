"""One line for each finished request: who, how much, from where, why not, how long. Never what was said."""

import json
import logging
from typing import Any

from emberkv.core.sequence import FinishReason
from emberkv.serving.admin.asked import Asked
from emberkv.serving.answers.answer import Answer
from emberkv.serving.api.cache_header import CacheSummary
from emberkv.serving.metrics import AnswerTimer

logger = logging.getLogger("emberkv.requests")


def log_finished(asked: Asked, request_id: str, answer: Answer, timer: AnswerTimer, summary: CacheSummary) -> None:
    """Everything told is a number, or a name that the server or its operator gave."""
    seconds = timer.first_token_seconds
    fields = {
        "request": request_id,
        "api": asked.api,
        "tenant": asked.tenant.name,
        "finish": (answer.finish_reason or FinishReason.ABORT).value,
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": answer.usage.cached_tokens,
        "completion_tokens": answer.completion_tokens,
        "cache": str(summary),
        "first_token_seconds": seconds and round(seconds, 4),
        "total_seconds": round(timer.total_seconds, 4),
        "canonical": dict(asked.canonical),
    }
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
