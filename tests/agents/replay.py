"""Sends a recorded session's requests to the APIs, and reads what comes back as the vendors' SDKs do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import anthropic.types
import httpx
import openai.types.chat
import openai.types.responses
from pydantic import TypeAdapter

from emberkv.serving.answer_service import HISTORY_HEADER
from tests.agents.session_file import Exchange, ids_in
from tests.serving.harness import Client

_ANTHROPIC: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)
_RESPONSES: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)


@dataclass
class Reply:
    """An answer as an agent gets it. events: the types of its stream's events, in order, without pings.

    prompt_tokens, cached_tokens, output_tokens: by its usage. calls: name and arguments. history: what became of the
    answers in the request, by outcome.
    """

    exchange: Exchange
    status: int
    events: list[str] = field(default_factory=list)
    reasoning: str = ""
    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    stop: str | None = None
    history: dict[str, int] = field(default_factory=dict)


class Replay:
    """say: is called with what the model is to answer to the next request."""

    def __init__(self, client: Client | httpx.Client, say: Callable[[str], None]) -> None:
        self._client = client
        self._say = say
        self._ids: dict[str, str] = {}  # of this session, by those of the recorded one

    def send(self, exchange: Exchange) -> Reply:
        """Send a request as the agent would in this session: with the ids that its own answers have got."""
        self._say(exchange.answer or "")
        body = None
        if exchange.body is not None:
            body = json.dumps(exchange.body)
            for recorded, own in self._ids.items():
                body = body.replace(recorded, own)
        response = self._client.request(
            exchange.method, exchange.path, content=body, headers=exchange.headers, timeout=120
        )
        self._ids.update(_pairs(exchange.ids, ids_in(response.text)))
        return read_reply(exchange, response)


def read_reply(exchange: Exchange, response: httpx.Response) -> Reply:
    reply = Reply(exchange, response.status_code)
    if counts := response.headers.get(HISTORY_HEADER):
        reply.history = {name: int(count) for name, count in (each.split("=") for each in counts.split(";"))}
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        path = exchange.path.partition("?")[0]
        {"/v1/messages": _anthropic, "/v1/chat/completions": _chat, "/v1/responses": _responses}[path](reply, response)
    return reply


def check_turns(turns: Sequence[Reply]) -> None:
    """Each turn of a session has found all of the turn before in the cache, its answer included."""
    for before, turn in pairwise(turns):
        assert turn.cached_tokens == before.prompt_tokens + before.output_tokens > 1000
    history = turns[-1].history  # "unknown" are answers that the agent has made up itself
    assert history.keys() <= {"same_text", "rewritten", "unknown"}
    assert history.get("same_text", 0) + history.get("rewritten", 0) == len(turns) - 1


def _pairs(recorded: list[str], own: list[str]) -> dict[str, str]:
    """The ids of each kind, in their order."""
    pairs: dict[str, str] = {}
    for kind in {each.partition("_")[0] for each in recorded}:
        mine = [each for each in own if each.startswith(f"{kind}_")]
        theirs = [each for each in recorded if each.startswith(f"{kind}_")]
        pairs.update(zip(theirs, mine, strict=False))
    return pairs


def _events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _anthropic(reply: Reply, response: httpx.Response) -> None:
    arguments = ""
    for event in _events(response):
        if event["type"] == "ping":
            continue
        reply.events.append(event["type"])
        match _ANTHROPIC.validate_python(event):
            case anthropic.types.RawMessageStartEvent(message=message):
                usage = message.usage
                reply.cached_tokens = usage.cache_read_input_tokens or 0
                created = usage.cache_creation_input_tokens or 0
                reply.prompt_tokens = usage.input_tokens + reply.cached_tokens + created
            case anthropic.types.RawContentBlockStartEvent(content_block=anthropic.types.ToolUseBlock(name=name)):
                reply.calls.append((name, None))
                arguments = ""
            case anthropic.types.RawContentBlockDeltaEvent(delta=anthropic.types.TextDelta(text=text)):
                reply.text += text
            case anthropic.types.RawContentBlockDeltaEvent(delta=anthropic.types.ThinkingDelta(thinking=text)):
                reply.reasoning += text
            case anthropic.types.RawContentBlockDeltaEvent(delta=anthropic.types.InputJSONDelta(partial_json=text)):
                arguments += text
                if _is_json(arguments):
                    reply.calls[-1] = (reply.calls[-1][0], json.loads(arguments))
            case anthropic.types.RawMessageDeltaEvent(delta=delta, usage=last_usage):
                reply.stop, reply.output_tokens = delta.stop_reason, last_usage.output_tokens


def _chat(reply: Reply, response: httpx.Response) -> None:
    calls: dict[int, list[str]] = {}
    for event in _events(response):
        chunk = openai.types.chat.ChatCompletionChunk.model_validate(event)
        for choice in chunk.choices:
            reply.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            reply.text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.index not in calls:
                    assert call.id
                    assert call.function.name
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
            reply.stop = choice.finish_reason or reply.stop
            reply.events.append("finish" if choice.finish_reason else "delta")
        if chunk.usage is not None:
            reply.events.append("usage")
            details = chunk.usage.prompt_tokens_details
            reply.cached_tokens = (details and details.cached_tokens) or 0
            reply.prompt_tokens, reply.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    reply.calls = [(name, json.loads(arguments)) for name, arguments in calls.values()]


def _responses(reply: Reply, response: httpx.Response) -> None:
    for number, event in enumerate(_events(response)):
        assert event["sequence_number"] == number
        reply.events.append(event["type"])
        checked = _RESPONSES.validate_python(event)
        if not isinstance(checked, openai.types.responses.ResponseCompletedEvent):
            continue
        reply.stop = checked.response.status
        for item in checked.response.output:
            match item:
                case openai.types.responses.ResponseReasoningItem():
                    reply.reasoning += "".join(part.text for part in item.content or item.summary)
                case openai.types.responses.ResponseFunctionToolCall(name=name, arguments=arguments):
                    reply.calls.append((name, json.loads(arguments)))
        reply.text = checked.response.output_text
        usage = checked.response.usage
        assert usage is not None
        reply.prompt_tokens, reply.output_tokens = usage.input_tokens, usage.output_tokens
        reply.cached_tokens = usage.input_tokens_details.cached_tokens


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
