"""Parses the answers of foreign workers: usage, the first token of a stream, and whether a stream is complete."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import msgspec

from emberkv.cluster.foreign.worker import Usage

_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")
_DONE = b"[DONE]"

OF_THE_CONNECTION = frozenset({
    "connection", "content-length", "content-encoding", "date", "keep-alive", "proxy-authenticate", "server", "te",
    "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""Response headers that belong to one connection and are not forwarded."""


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a worker's response that are forwarded to the client, byte for byte.

    aiohttp decodes headers as UTF-8, and Starlette encodes them as Latin-1.
    """
    return {
        name.lower(): value.encode("utf-8", "surrogateescape").decode("latin-1")
        for name, value in headers.items()
        if name.lower() not in OF_THE_CONNECTION
    }


def usage_of(answer: Any) -> Usage | None:
    """The usage in the JSON of an answer or a chunk, or None. llama.cpp may report cached tokens in ``timings``."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict) or not _is_count(usage.get("prompt_tokens")):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    timings = answer.get("timings")
    if cached is None and isinstance(timings, dict):
        cached = timings.get("cache_n")
    completion = usage.get("completion_tokens")
    return Usage(
        usage["prompt_tokens"],
        completion if _is_count(completion) else 0,
        min(cached, usage["prompt_tokens"]) if _is_count(cached) else None,
    )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def decoded(data: bytes) -> Any:
    """The decoded JSON; None for invalid JSON, and for JSON that is nested too deeply."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class AnswerEvents:
    """Parses one stream of server-sent events, which pass unchanged. Usage is removed if the client did not ask for it.

    keeps_usage: whether the client asked for usage. has_begun: whether a token has arrived. is_done: whether
    ``[DONE]`` has arrived. has_failed: whether an event was an error. finish_reason: of the choice that ended last, ""
    before any has ended. response_id: the answer's id, "" before it is known. parts: how many chunks had a part of an
    answer; each has one token or more. on_chunk: called with each chunk's JSON.
    """

    def __init__(self, *, keeps_usage: bool, on_chunk: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.usage: Usage | None = None
        self.has_begun = False
        self.is_done = False
        self.has_failed = False
        self.finish_reason = ""
        self.response_id = ""
        self.parts = 0
        self._keeps_usage = keeps_usage
        self._on_chunk = on_chunk
        self._begun: set[str] = set()  # choices, by their index
        self._ended: set[str] = set()
        self._rest = b""

    @property
    def is_whole(self) -> bool:
        """Whether the stream is complete if it ends here: each answer has a ``finish_reason``, or there was an error.

        Some servers do not send ``[DONE]``, and some send it after an answer that they have broken off.
        """
        has_ended = self.has_failed or (bool(self._begun) and self._begun == self._ended)
        return has_ended and (self.is_done or not self._rest.strip())

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that ``data`` completes, as they are sent to the client; ``[DONE]`` only of a complete stream."""
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
            return event if self.is_whole else b""
        chunk = decoded(payload) if payload else None
        if not isinstance(chunk, dict):
            return event
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        if chunk.get("error"):
            self.has_failed = True
            return event
        self.usage = usage_of(chunk) or self.usage
        self.response_id = self.response_id or str(chunk.get("id") or "")
        listed = chunk.get("choices")
        choices = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        for choice in choices:
            self._take_choice(choice)
        if "usage" not in chunk or self._keeps_usage:
            return event
        if not choices:
            return b""
        del chunk["usage"]
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index, reason = str(choice.get("index", 0)), choice.get("finish_reason")
        self._begun.add(index)
        if reason:
            self.finish_reason = str(reason)
            self._ended.add(index)
        has_content = _has_content(choice)
        self.parts += has_content
        self.has_begun = self.has_begun or bool(reason) or has_content


def as_stream(answer: dict[str, Any], *, keeps_usage: bool) -> bytes:
    """The events of a whole answer, for a client that has asked for a stream: one chunk, and ``[DONE]``."""
    choices = [_as_part(choice) for choice in answer["choices"]]
    chunk = {**answer, "choices": choices}
    if answer.get("object") == "chat.completion":
        chunk["object"] = "chat.completion.chunk"
    if not keeps_usage:
        chunk.pop("usage", None)
    return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: " + _DONE + b"\n\n"


def _as_part(choice: Any) -> Any:
    """A whole answer's choice as that of a chunk, whose tool calls are numbered."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return choice
    calls = message.get("tool_calls")
    objects = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    numbered = [{"index": index, **call} for index, call in enumerate(objects)]
    delta = {**message, "tool_calls": numbered} if numbered else message
    return {**{name: value for name, value in choice.items() if name != "message"}, "delta": delta}


def _has_content(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has more than the role with which an answer begins."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for name, value in delta.items() if name != "role")
    return bool(choice.get("text"))
