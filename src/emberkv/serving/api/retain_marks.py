"""``cache_control``: prefixes that a request wants retained for a while. They are evicted last, but not locked.

Anthropic's marks stand on blocks of the system prompt and of messages, on tools, and on the request itself; on OpenAI
requests the same object is accepted on messages, their text parts and tools. A mark covers the prompt from its
beginning through what it is on. Of several, the one that lasts longest counts, and of these the last, since it covers
the others.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from emberkv.engine.tokenization.tokenizer import Tokenizer
from emberkv.errors import RequestError
from emberkv.serving.api.anthropic_schema import PromptRequest
from emberkv.serving.api.openai_schema import ChatCompletionRequest

FIELD = "cache_control"
LIFETIMES = {"5m": 300.0, "1h": 3600.0}

Request = TypeVar("Request", PromptRequest, ChatCompletionRequest)
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mark(Generic[Request]):
    """seconds: how long to keep it. cut: the request as far as the mark covers it."""

    seconds: float
    cut: Request


def anthropic_mark(request: PromptRequest) -> Mark[PromptRequest] | None:
    """The mark that counts; None without one. Raises RequestError for one that cannot be used."""
    return _lasting_longest(_anthropic_marks(request))


def chat_mark(request: ChatCompletionRequest) -> Mark[ChatCompletionRequest] | None:
    """As `anthropic_mark`."""
    return _lasting_longest(_chat_marks(request))


def covered_tokens(tokenizer: Tokenizer, text: str, token_ids: Sequence[int], cut_text: str) -> int:
    """How many of a prompt's tokens lie within what it has in common with its cut form, both rendered."""
    shorter = min(len(text), len(cut_text))
    length = bisect_left(range(shorter), True, key=lambda at: text[: at + 1] != cut_text[: at + 1])
    common = tokenizer.encode(text[:length], add_special_tokens=False)
    pairs = zip(common, token_ids, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(common), len(token_ids)))


def without_marks(tools: list[Json] | None) -> list[Json] | None:
    """OpenAI tools as the template is to show them: a mark on one is no part of it."""
    return tools and [{key: value for key, value in tool.items() if key != FIELD} for tool in tools]


Candidate = tuple[float, Callable[[], Request]]
"""A mark's seconds, and what makes its cut. Only the cut of the mark that counts is made: each is a copy."""


def _lasting_longest(marks: Iterator[Candidate[Request]]) -> Mark[Request] | None:
    best = None
    for mark in marks:
        if best is None or mark[0] >= best[0]:
            best = mark
    return None if best is None else Mark(best[0], best[1]())


def _anthropic_marks(request: PromptRequest) -> Iterator[Candidate[PromptRequest]]:
    if seconds := _seconds({FIELD: request.cache_control}, ""):
        yield seconds, lambda: request  # of the request itself: all of it is covered
    anyone = [{"role": "user", "content": ""}]  # templates want a message behind the system prompt
    for index, tool in enumerate(request.tools or ()):
        if seconds := _seconds(tool, f"tools.{index}"):
            yield seconds, partial(_with_beginning, request, "tools", index, messages=anyone)
    if isinstance(request.system, list):
        for index, block in enumerate(request.system):
            if seconds := _seconds(block, f"system.{index}"):
                yield seconds, partial(_with_beginning, request, "system", index, messages=anyone)
    yield from _message_marks(request, request.messages, "messages.{}", ".content.{}")


def _chat_marks(request: ChatCompletionRequest) -> Iterator[Candidate[ChatCompletionRequest]]:
    for index, tool in enumerate(request.tools or ()):
        if seconds := _seconds(tool, f"tools[{index}]"):
            yield seconds, partial(_with_beginning, request, "tools", index)
    yield from _message_marks(request, request.messages, "messages[{}]", ".content[{}]")


def _message_marks(
    request: Request, messages: list[Json], message_place: str, part_place: str
) -> Iterator[Candidate[Request]]:
    for index, message in enumerate(messages):
        place = message_place.format(index)
        content = message.get("content")
        for part, each in enumerate(content if isinstance(content, list) else ()):
            if seconds := _seconds(each, place + part_place.format(part)):
                yield seconds, partial(_to_part, request, index, part)
        if seconds := _seconds(message, place):
            yield seconds, partial(_with_beginning, request, "messages", index)


def _with_beginning(request: Request, field: str, index: int, **changes: Any) -> Request:
    """The request with ``field``, a list, up to ``index``."""
    return request.model_copy(update={field: getattr(request, field)[: index + 1], **changes})


def _to_part(request: Request, index: int, part: int) -> Request:
    """The request with its messages up to ``part`` of the content of message ``index``."""
    message = request.messages[index]
    last = {**message, "content": message["content"][: part + 1]}
    return request.model_copy(update={"messages": [*request.messages[:index], last]})


def _seconds(marked: object, place: str) -> float:
    """How long something is to be kept; 0 where it bears no mark."""
    control = marked.get(FIELD) if isinstance(marked, dict) else None
    if control is None:
        return 0.0
    at = f"{place}.{FIELD}" if place else FIELD
    if not isinstance(control, dict) or control.get("type") != "ephemeral":
        raise RequestError(f"{at} is {control!r}; it must be an object with type 'ephemeral'", param=at)
    lifetime = control.get("ttl", "5m")
    if not isinstance(lifetime, str) or lifetime not in LIFETIMES:
        raise RequestError(f"{at}.ttl is {lifetime!r}; it must be '5m' or '1h'", param=f"{at}.ttl")
    return LIFETIMES[lifetime]
