"""Encodes an answer as content blocks of the Anthropic API (thinking, text, tool calls), whole or as events."""

import hmac
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import from_json

from emberkv.serving.event_stream import compact_json, sse_event
from emberkv.serving.parsing.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    OutputEvent,
    ParsedCall,
    ParsedMessage,
    ReasoningText,
)

INVALID_JSON = "INVALID_JSON"
"""The key for a tool's input that is not a JSON object, as Anthropic's documentation proposes."""


class Signer:
    """Signs thinking blocks by an HMAC with the tenant's salt. Clients send the signature back with the block. It is
    not verified, as the text is only rendered.
    """

    def __init__(self, salt: bytes) -> None:
        self._key = b"emberkv-thought-1" + salt
        self._digest = hmac.new(self._key, digestmod="sha256")

    def add(self, text: str) -> None:
        """Add text to the current block."""
        self._digest.update(text.encode(errors="replace"))

    def signature(self) -> str:
        """The signature of the text since the last call, in base64."""
        signed = b64encode(self._digest.digest()).decode()
        self._digest = hmac.new(self._key, digestmod="sha256")
        return signed


def content_blocks(message: ParsedMessage, signer: Signer) -> list[dict[str, Any]]:
    """A whole answer's blocks, in the order of a stream's. An empty answer has one empty text block."""
    blocks: list[dict[str, Any]] = []
    for part in message.parts():
        match part:
            case ReasoningText(text):
                signer.add(text)
                blocks.append({"type": "thinking", "thinking": text, "signature": signer.signature()})
            case ContentText(text):
                blocks.append({"type": "text", "text": text})
            case ParsedCall():
                blocks.append({"type": "tool_use", "id": part.call_id, "name": part.name, "input": tool_input(part)})
    return blocks or [{"type": "text", "text": ""}]


def tool_input(call: ParsedCall) -> dict[str, Any]:
    """A call's arguments as an object. If the answer was cut off, it has the arguments up to there.

    >>> tool_input(ParsedCall("read", '{"path": "a.py", "limit": 2', is_complete=False))
    {'path': 'a.py', 'limit': 2}
    """
    try:
        found = from_json(call.arguments, allow_partial="trailing-strings") if call.arguments else {}
        json.dumps(found, allow_nan=False)  # 1e999 is decoded as infinity, which JSON cannot encode
    except ValueError:  # the client gets the text that the model wrote
        found = None
    return found if isinstance(found, dict) else {INVALID_JSON: call.arguments}


class BlockEvents:
    """Encodes an answer's content as server-sent events, block by block."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._index = -1
        self._open = ""  # the type of the block that has begun and not ended

    def of(self, events: Iterable[OutputEvent]) -> Iterator[bytes]:
        """The API's events for the next parsed events. Deltas are formatted without `sse_event`, for speed: there is
        one for each token.
        """
        for event in events:
            match event:
                case ContentText(text):
                    if self._open != "text":
                        yield from self._begin({"type": "text", "text": ""})
                    yield self._delta("text_delta", "text", text)
                case ReasoningText(text):
                    if self._open != "thinking":
                        yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                    self._signer.add(text)
                    yield self._delta("thinking_delta", "thinking", text)
                case CallBegin(_, name, call_id):
                    yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                case CallArguments(_, text):
                    yield self._delta("input_json_delta", "partial_json", text)
                case CallEnd():
                    yield from self._end()

    def rest(self) -> Iterator[bytes]:
        """The events that end the last block. An answer without blocks gets an empty text block."""
        if self._index < 0:
            yield from self._begin({"type": "text", "text": ""})
        yield from self._end()

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        """End the block before, and begin another."""
        yield from self._end()
        self._index += 1
        self._open = block["type"]
        yield _event("content_block_start", index=self._index, content_block=block)

    def _end(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta("signature_delta", "signature", self._signer.signature())
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            f'"delta":{{"type":"{kind}","{name}":{compact_json(text)}}}}}\n\n'
        ).encode()


def _event(kind: str, **fields: object) -> bytes:
    return sse_event({"type": kind, **fields}, kind)
