"""The results of parsers: events while the text is generated, or a whole message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """A piece of the reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """A piece of the answer's content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. index: of the call in the answer, from 0. call_id: the id that the model wrote, if any."""

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
    """A call has ended. is_complete: whether its joined arguments are a whole JSON object."""

    index: int
    is_complete: bool


OutputEvent: TypeAlias = ReasoningText | ContentText | CallBegin | CallArguments | CallEnd


class OutputParser(Protocol):
    """Parses one answer. The result does not depend on how the text is cut, apart from the pieces of text in events."""

    def feed(self, text: str) -> list[OutputEvent]:
        """Add the next text, and return the events that are now certain."""
        ...

    def finish(self) -> list[OutputEvent]:
        """End the text, and return the last events."""
        ...


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One tool call. arguments: the text that the model wrote, a JSON object if ``is_complete``."""

    name: str
    arguments: str
    call_id: str | None = None
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole answer. reasoning, content: empty where there is none.

    order: its parts as the model wrote them, each text or thought whole; empty: reasoning, content and calls.
    """

    reasoning: str = ""
    content: str = ""
    calls: tuple[ParsedCall, ...] = ()
    order: tuple[ReasoningText | ContentText | ParsedCall, ...] = field(default=(), compare=False, repr=False)

    def parts(self) -> "Sequence[ReasoningText | ContentText | ParsedCall]":
        """The parts in their order.

        >>> ParsedMessage("Hm.", "Let me look.").parts()
        [ReasoningText(text='Hm.'), ContentText(text='Let me look.')]
        """
        if self.order:
            return self.order
        thought = [ReasoningText(self.reasoning)] if self.reasoning else []
        text = [ContentText(self.content)] if self.content else []
        return [*thought, *text, *self.calls]


@dataclass(slots=True)
class _Call:
    name: str
    call_id: str | None
    arguments: list[str] = field(default_factory=list)
    is_complete: bool = False

    def joined(self) -> ParsedCall:
        return ParsedCall(self.name, "".join(self.arguments), self.call_id, self.is_complete)


@dataclass(slots=True)
class _Text:
    kind: type[ReasoningText | ContentText]
    pieces: list[str] = field(default_factory=list)

    def joined(self) -> ReasoningText | ContentText:
        return self.kind("".join(self.pieces))


class MessageBuilder:
    """Joins the events of one answer."""

    def __init__(self) -> None:
        self._parts: list[_Text | _Call] = []
        self._calls: list[_Call] = []

    def add(self, events: Iterable[OutputEvent]) -> None:
        for event in events:
            match event:
                case ReasoningText(text) | ContentText(text):
                    self._text(type(event)).append(text)
                case CallBegin(_, name, call_id):
                    self._calls.append(_Call(name, call_id))
                    self._parts.append(self._calls[-1])
                case CallArguments(index, text):
                    self._calls[index].arguments.append(text)
                case CallEnd(index, is_complete):
                    self._calls[index].is_complete = is_complete

    def message(self) -> ParsedMessage:
        """The message up to the last event."""
        order = tuple(part.joined() for part in self._parts)
        return ParsedMessage(
            "".join(part.text for part in order if isinstance(part, ReasoningText)),
            "".join(part.text for part in order if isinstance(part, ContentText)),
            tuple(part for part in order if isinstance(part, ParsedCall)),
            order,
        )

    def _text(self, kind: type[ReasoningText | ContentText]) -> list[str]:
        """The pieces of the last part if it is a text of this kind, else of a new one."""
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Text) or last.kind is not kind:
            last = _Text(kind)
            self._parts.append(last)
        return last.pieces


def joined(events: Iterable[OutputEvent]) -> list[OutputEvent]:
    """The events, with adjacent pieces of the same text merged, so that results for differently cut text are equal."""
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
