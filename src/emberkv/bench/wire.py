"""The wire room: the part of OpenAI's streaming answers that timing needs, read leniently, and nothing else."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from emberkv.errors import EmberError

END_OF_STREAM = "[DONE]"


class AnswerError(EmberError):
    """A server's answer is an error, or is not what the protocol promises."""


class PromptDetails(BaseModel):
    cached_tokens: int | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class Delta(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(BaseModel):
    delta: Delta | None = None  # chat
    text: str | None = None  # completions
    finish_reason: str | None = None


class Chunk(BaseModel):
    """One event of a stream. ``error`` is what servers send when they fail after the headers."""

    choices: list[Choice] = []
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


def parse_chunk(data: str) -> Chunk:
    """Raises AnswerError when ``data`` is no JSON object of the expected shape, or carries an error."""
    try:
        chunk = Chunk.model_validate_json(data)
    except ValidationError as error:
        raise AnswerError(f"the stream holds {data[:200]!r}; an OpenAI chunk was expected") from error
    if chunk.error is not None:
        raise AnswerError(f"the server failed within the stream: {json.dumps(chunk.error)[:500]}")
    return chunk


async def chunks(response: httpx.Response) -> AsyncIterator[Chunk]:
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
