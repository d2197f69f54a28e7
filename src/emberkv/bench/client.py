"""Sends one streaming request, reads OpenAI's answer leniently, and records when each piece of it arrived."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypedDict

import httpx
from pydantic import BaseModel, ValidationError

from emberkv.errors import EmberError

END_OF_STREAM = "[DONE]"


class AnswerError(EmberError):
    """A server's answer is an error, or is not what the protocol promises."""


class Message(TypedDict):
    """One message of a conversation, as OpenAI's API has it.

    >>> flatten([Message(role="user", content="Hello")])
    'Hello'
    """

    role: str
    content: str


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class Usage(BaseModel):
    """The token counts that a server reports; None for what it leaves out.

    >>> Usage.model_validate({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}}).cached_tokens
    5
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class _Delta(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    delta: _Delta | None = None  # chat
    text: str | None = None  # completions
    finish_reason: str | None = None


class StreamChunk(BaseModel):
    """One event of a stream. error: what servers send when they fail after the headers.

    >>> chunk = parse_chunk('{"choices": [{"delta": {"content": "Hi"}}]}')
    >>> chunk.answer, chunk.finish_reason
    ('Hi', None)
    """

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def answer(self) -> str:
        """Text that belongs to the conversation's history."""
        return "".join((c.delta.content if c.delta else c.text) or "" for c in self.choices)

    @property
    def visible(self) -> str:
        """Text that a reader sees appear: the answer, and the reasoning where a server shows it."""
        thoughts = (c.delta.reasoning or c.delta.reasoning_content or "" for c in self.choices if c.delta)
        return "".join(thoughts) + self.answer

    @property
    def finish_reason(self) -> str | None:
        return next((c.finish_reason for c in self.choices if c.finish_reason), None)


def parse_chunk(data: str) -> StreamChunk:
    """Raises AnswerError when ``data`` is no JSON object of the expected shape, or carries an error."""
    try:
        chunk = StreamChunk.model_validate_json(data)
    except ValidationError as error:
        raise AnswerError(f"the stream holds {data[:200]!r}; an OpenAI chunk was expected") from error
    if chunk.error is not None:
        raise AnswerError(f"the server failed within the stream: {json.dumps(chunk.error)[:500]}")
    return chunk


async def chunks(response: httpx.Response) -> AsyncIterator[StreamChunk]:
    """The events of a server-sent-event stream, up to its end mark.

    Raises AnswerError on a malformed event, and when the stream ends without the mark.
    """
    async for line in response.aiter_lines():
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == END_OF_STREAM:
            return
        yield parse_chunk(value)
    raise AnswerError(f"the stream ended without 'data: {END_OF_STREAM}'")


Clock = Callable[[], float]
"""Monotonic seconds."""


class Endpoint(Enum):
    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True)
class Target:
    """The model that requests go to, and in which form.

    extensions: also send ``ignore_eos``, which is not in OpenAI's API but which most open servers know.

    >>> target = Target("emberkv-demo", Endpoint.COMPLETIONS)
    >>> target.path, target.body([{"role": "user", "content": "Hello"}], max_tokens=4)["prompt"]
    ('/v1/completions', 'Hello')
    """

    model: str
    endpoint: Endpoint = Endpoint.CHAT
    extensions: bool = True
    seed: int = 0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint is Endpoint.CHAT else "/v1/completions"

    def body(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.extensions:
            body["ignore_eos"] = True
        if self.endpoint is Endpoint.CHAT:
            return body | {"messages": list(messages)}
        return body | {"prompt": flatten(messages)}


def flatten(messages: Sequence[Message]) -> str:
    """The conversation as plain text for the completions endpoint; a lone user message is sent as it is."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in messages) + "assistant:"


@dataclass(slots=True)
class TimedAnswer:
    """What came back, and when: times in seconds of the clock given.

    piece_times: arrival of each piece of visible text. A server may put several tokens in one piece.
    finished: arrival of the finish reason, None if the server gave none.

    >>> answer = TimedAnswer(sent=1.0, piece_times=[1.25, 1.5, 2.0])
    >>> answer.ttft, answer.gaps, answer.output_tokens
    (0.25, [0.25, 0.5], 3)
    """

    sent: float
    piece_times: list[float] = field(default_factory=list)
    finished: float | None = None
    ended: float = 0.0
    text: str = ""
    usage: Usage | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first visible text; for an answer without text, to its finish reason.

        None when neither came. A server that echoes the prompt as its first piece makes this read too low.
        """
        first = self.piece_times[0] if self.piece_times else self.finished
        return None if first is None else first - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive pieces of text."""
        return [b - a for a, b in zip(self.piece_times, self.piece_times[1:], strict=False)]

    @property
    def output_tokens(self) -> int:
        """Tokens as the server counts them; the number of pieces where it does not report them."""
        reported = self.usage.completion_tokens if self.usage else None
        return len(self.piece_times) if reported is None else reported


async def ask(
    client: httpx.AsyncClient,
    target: Target,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    clock: Clock,
    on_text: Callable[[], None] | None = None,
) -> TimedAnswer:
    """One request, timed. Whatever goes wrong with it is in the answer's ``error``, beside what came before.

    on_text: called once, when the first visible text arrives.
    """
    answer = TimedAnswer(sent=clock())
    try:
        request = client.stream("POST", target.path, json=target.body(messages, max_tokens))
        async with request as response:
            if response.is_error:
                reason = (await response.aread()).decode(errors="replace")
                raise AnswerError(f"HTTP {response.status_code}: {reason[:500]}")
            await _read(response, answer, clock, on_text)
    except (AnswerError, httpx.HTTPError) as error:
        answer.error = f"{type(error).__name__}: {error}".rstrip(": ")
    answer.ended = clock()
    return answer


async def _read(
    response: httpx.Response, answer: TimedAnswer, clock: Clock, on_text: Callable[[], None] | None
) -> None:
    async for chunk in chunks(response):
        now = clock()
        if chunk.visible:
            answer.piece_times.append(now)
            if on_text and len(answer.piece_times) == 1:
                on_text()
        answer.text += chunk.answer
        if answer.finished is None and chunk.finish_reason:
            answer.finished = now
        answer.usage = chunk.usage or answer.usage
    if answer.ttft is None:
        raise AnswerError("the stream held neither text nor a finish reason")
