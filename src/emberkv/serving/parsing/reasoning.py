"""Separates reasoning from the rest of an answer, and trims white space around reasoning and calls."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from emberkv.serving.parsing.events import CallBegin, CallEnd, ContentText, OutputEvent, ReasoningText
from emberkv.serving.parsing.reader import Markers, Steps, TextReader

_NOTHING = Markers(())


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """The tags around reasoning, which comes first in an answer.

    trimmed: characters that templates strip from both ends of reasoning and from the beginning of the content.
    interrupts: markers that end reasoning, too, and belong to the content. begins_inside: whether every answer begins
    within reasoning, whatever the prompt ends with.
    """

    begin: str = "<think>"
    end: str = "</think>"
    trimmed: str = "\n"
    interrupts: tuple[str, ...] = ()
    begins_inside: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The tags, without the word and line break that belong to the opening tag of some formats."""
        return (self.begin.removesuffix("thought\n"), self.end)

    def steps(self, reader: TextReader, *, in_reasoning: bool) -> Steps[None]:
        """Yield reasoning as ReasoningText, and all other text as ContentText."""
        reader.record()
        yield from reader.skip()
        has_tag = yield from reader.literal(self.begin)
        before = reader.recorded()
        if has_tag or in_reasoning or self.begins_inside:
            yield from self._thought(reader)
        elif before:
            yield ContentText(before)
        yield from reader.until(_NOTHING, ContentText)

    def _thought(self, reader: TextReader) -> Steps[None]:
        yield from reader.skip(self.trimmed)
        ends = (self.end, *self.interrupts)
        stops = Markers((*ends, *self.trimmed))
        while (yield from reader.before(stops, ReasoningText)):
            reader.record()
            yield from reader.skip(self.trimmed)
            cut = reader.recorded()
            marker = yield from reader.one_of(ends)
            if marker == self.end:
                yield from reader.skip(self.trimmed)
                return
            if marker:
                yield ContentText(marker)
                return
            if (yield from reader.next_char()):
                yield ReasoningText(cut)


class WhiteSpace:
    """Drops content that is only white space before, between and after calls."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._has_call = False
        self._is_blank = True

    def tidy(self, events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
        for event in events:
            match event:
                case ContentText(text):
                    if self._is_blank and not text.strip():
                        self._held.append(text)
                        continue
                    self._is_blank = False
                    yield ContentText("".join((*self._held, text))) if self._held else event
                    self._held.clear()
                case CallBegin():
                    self._held.clear()
                    self._has_call = True
                    yield event
                case CallEnd():
                    self._is_blank = True
                    yield event
                case _:
                    yield event

    def rest(self) -> Iterator[OutputEvent]:
        """The white space that was held back, at the answer's end, if the answer has no call."""
        if self._held and not self._has_call:
            yield ContentText("".join(self._held))
