"""The stopwatch room: sends one streaming request and writes down when its answer came."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx

from emberkv.bench.wire import AnswerError, Usage, chunks
from emberkv.bench.workload import Message

Clock = Callable[[], float]
"""Monotonic seconds."""


class Endpoint(Enum):
    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True)
class Target:
    """Which model of the server to ask, and how.

    extensions: also send ``ignore_eos``, which is not in OpenAI's API but which most open servers know.
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
class Answer:
    """What came back, and when: times in seconds of the clock given.

    piece_times: arrival of each piece of visible text. A server may put several tokens in one piece.
    finished: arrival of the finish reason, None if the server gave none.
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
        """As the server counts them; where it does not say, the number of pieces."""
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
) -> Answer:
    """One request, timed. Whatever goes wrong with it is in the answer's ``error``, beside what came before.

    on_text: called once, when the first visible text arrives.
    """
    answer = Answer(sent=clock())
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


async def _read(response: httpx.Response, answer: Answer, clock: Clock, on_text: Callable[[], None] | None) -> None:
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
