"""Reads the answer of a server that speaks the OpenAI API: its usage, where it begins, and whether it is whole."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from emberkv.cluster.foreign.worker import Usage

_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")
_DONE = b"[DONE]"

OF_THE_CONNECTION = frozenset({
    "connection", "content-length", "content-encoding", "date", "keep-alive", "proxy-authenticate", "server", "te",
    "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""Headers of answers that say how they came, not what they are."""


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """A worker's answer's headers as a client is to get them."""
    return {name.lower(): value for name, value in headers.items() if name.lower() not in OF_THE_CONNECTION}


def usage_of(answer: Any) -> Usage | None:
    """The usage in an answer's or a chunk's JSON; None where there is none. llama.cpp may say what was cached in
    ``timings`` instead.
    """
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    timings = answer.get("timings")
    if cached is None and isinstance(timings, dict):
        cached = timings.get("cache_n")
    completion = usage.get("completion_tokens")
    return Usage(
        usage["prompt_tokens"],
        completion if isinstance(completion, int) else 0,
        min(cached, usage["prompt_tokens"]) if isinstance(cached, int) and cached >= 0 else None,
    )


def decoded(data: bytes) -> Any:
    """JSON's value; None for what is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class AnswerEvents:
    """The events of one stream. They pass as they are, but for the usage if only the gateway asked for it.

    keeps_usage: whether the client asked for it. has_begun: a token has come. is_done: the stream's last event has
    come. response_id: of the answer, once it is known.
    """

    def __init__(self, *, keeps_usage: bool) -> None:
        self.usage: Usage | None = None
        self.has_begun = False
        self.is_done = False
        self.response_id = ""
        self._keeps_usage = keeps_usage
        self._has_finished = False
        self._rest = b""

    @property
    def is_whole(self) -> bool:
        """Whether the stream may end here. Some servers do not send ``[DONE]``."""
        return self.is_done or (self._has_finished and not self._rest.strip())

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that are complete with ``data``, as the client is to get them."""
        self._rest += data
        while (end := _END_OF_EVENT.search(self._rest)) is not None:
            event, self._rest = self._rest[: end.end()], self._rest[end.end() :]
            if kept := self._take(event):
                yield kept

    def _take(self, event: bytes) -> bytes:
        lines = [line.removeprefix(b"data:").strip() for line in event.splitlines() if line.startswith(b"data:")]
        payload = b"\n".join(lines)
        if payload == _DONE:
            self.is_done = True
            return event
        chunk = decoded(payload) if payload else None
        if not isinstance(chunk, dict):
            return event
        if chunk.get("error"):
            self._has_finished = self.has_begun = True
        self.usage = usage_of(chunk) or self.usage
        self.response_id = self.response_id or str(chunk.get("id") or "")
        choices = [each for each in chunk.get("choices") or () if isinstance(each, dict)]
        self._has_finished |= any(each.get("finish_reason") for each in choices)
        self.has_begun |= self._has_finished or any(map(_has_content, choices))
        if "usage" not in chunk or self._keeps_usage:
            return event
        if not choices:
            return b""
        del chunk["usage"]
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _has_content(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has more than the announcement that an answer begins."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for name, value in delta.items() if name != "role")
    return bool(choice.get("text"))
