"""Parses an answer into reasoning, content and tool calls while it is generated."""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.serving.parsing.events import (
    CallBegin,
    CallEnd,
    MessageBuilder,
    OutputEvent,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.parsing.formats import OutputFormat, ToolSchema

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 24
_SOURCE = random.SystemRandom()


def new_call_id(prefix: str, source: random.Random = _SOURCE) -> str:
    """The id of a tool call: ``prefix`` and 24 letters or digits that ``source`` draws."""
    return prefix + "".join(source.choices(_ID_CHARACTERS, k=_ID_LENGTH))


def openai_call_id() -> str:
    return new_call_id("call_")


@dataclass(frozen=True, slots=True)
class OutputParsing:
    """How the text of one answer is parsed.

    tools: those of the request that the answer may call; without any, the markup of calls is content. in_reasoning:
    whether the prompt ends inside a thought. parallel: False ends the answer behind its first call. new_call_id: makes
    the ids of calls to which the model gives none.
    """

    output_format: OutputFormat
    tools: Sequence[ToolSchema] = ()
    in_reasoning: bool = False
    parallel: bool = True
    new_call_id: Callable[[], str] = openai_call_id

    @property
    def special_tokens(self) -> frozenset[str]:
        """Those that the parser reads, by their text."""
        return self.output_format.special_tokens


class ParsedOutput:
    """Parses one answer as it grows.

    reasoning_tokens: tokens of the reasoning, markup included. calls: how many have begun. has_whole_call: whether the
    last call that has ended is complete. has_ended: whether the answer has had its only allowed call, and ends there.
    """

    def __init__(self, parsing: OutputParsing) -> None:
        self.reasoning_tokens = 0
        self.calls = 0
        self.has_whole_call = False
        self.has_ended = False
        self._parsing = parsing
        self._parser = parsing.output_format.parser(tools=parsing.tools, in_reasoning=parsing.in_reasoning)
        self._events: list[OutputEvent] = []
        self._message = MessageBuilder()
        self._undecided = 0  # tokens since the last event

    def count_token(self) -> None:
        """Count a token. Its text may arrive with later tokens, so it belongs to the next event."""
        self._undecided += 1

    def add(self, text: str) -> None:
        """Parse the next text of the answer."""
        if not self.has_ended:
            self._take_in(self._parser.feed(text))

    def finish(self) -> None:
        """End the text."""
        if not self.has_ended:
            self._take_in(self._parser.finish())

    @property
    def message(self) -> ParsedMessage:
        """All events so far, as a message."""
        return self._message.message()

    def take(self) -> tuple[OutputEvent, ...]:
        """The events since the last call."""
        taken = tuple(self._events)
        self._events.clear()
        return taken

    def _take_in(self, events: list[OutputEvent]) -> None:
        for event in events:
            known = self._with_id(event) if isinstance(event, CallBegin) else event
            self._events.append(known)
            self._message.add((known,))
            if isinstance(event, CallEnd):
                self.has_whole_call = event.is_complete
                if not self._parsing.parallel:
                    self.has_ended = True
                    break
        if events:
            self.reasoning_tokens += self._undecided * isinstance(self._events[-1], ReasoningText)
            self._undecided = 0

    def _with_id(self, call: CallBegin) -> CallBegin:
        self.calls += 1
        return CallBegin(call.index, call.name, call.call_id or self._parsing.new_call_id())
