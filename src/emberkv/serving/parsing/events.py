"""What parsers make of a model's output: events as the text comes, or the message as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """A piece of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. index: its place among the answer's calls, from 0. call_id: the one that the model wrote."""

    index: int
    name: str
    call_id: str | None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call has ended. is_complete: its arguments, joined, are a JSON object, and not cut off."""

    index: int
    is_complete: bool


OutputEvent: TypeAlias = ReasoningText | ContentText | CallBegin | CallArguments | CallEnd


class OutputParser(Protocol):
    """Parses one answer. How the text is cut into pieces changes no result: only how texts are cut into events."""

    def feed(self, text: str) -> list[OutputEvent]:
        """The events that are certain after ``text``, which follows what was fed before."""
        ...

    def finish(self) -> list[OutputEvent]:
        """The last events, once no more text comes."""
        ...


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One tool call. arguments: JSON text, which is a JSON object where ``is_complete``."""

    name: str
    arguments: str
    call_id: str | None = None
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole answer. reasoning, content: empty where there is none."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ParsedCall, ...] = ()


@dataclass(slots=True)
class _Call:
    name: str
    call_id: str | None
    arguments: list[str] = field(default_factory=list)
    is_complete: bool = False


class MessageBuilder:
    """Joins the events of one answer."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[_Call] = []

    def add(self, events: Iterable[OutputEvent]) -> None:
        for event in events:
            match event:
                case ReasoningText(text):
                    self._reasoning.append(text)
                case ContentText(text):
                    self._content.append(text)
                case CallBegin(_, name, call_id):
                    self._calls.append(_Call(name, call_id))
                case CallArguments(index, text):
                    self._calls[index].arguments.append(text)
                case CallEnd(index, is_complete):
                    self._calls[index].is_complete = is_complete

    def message(self) -> ParsedMessage:
        """What has come so far."""
        calls = (ParsedCall(call.name, "".join(call.arguments), call.call_id, call.is_complete) for call in self._calls)
        return ParsedMessage("".join(self._reasoning), "".join(self._content), tuple(calls))


def joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """The events with neighbouring pieces of one text as one, so that two ways to cut the same text compare equal."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        match last, event:
            case ReasoningText(before), ReasoningText(text):
                result[-1] = ReasoningText(before + text)
            case ContentText(before), ContentText(text):
                result[-1] = ContentText(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                result[-1] = CallArguments(index, before + text)
            case _:
                result.append(event)
    return result
