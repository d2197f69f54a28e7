"""A reader of an answer's text that waits for text that has not been generated yet, and the common part of parsers of
calls.

A parser is a generator: it reads from `TextReader`, yields events, and yields None to wait for more text. So each
format's parser is written like a parser of a whole text. Text is dropped when it has been read, and nothing is scanned
twice.
"""

import re
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import TypeVar

from emberkv.serving.parsing.events import ContentText, OutputEvent

Result = TypeVar("Result")
Steps = Generator[OutputEvent | None, None, Result]
"""A part of a parser: yields events, or None to wait for text, and returns a result."""


_MOST_SPACE = 64
"""The largest lookahead, in characters."""
_SPACE = re.compile(rf"\s{{0,{_MOST_SPACE}}}")


class Markers:
    """Literal texts that are searched for together. No text may be a prefix of another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.texts, key=len, reverse=True))) or r"(?!)")
        self._beginnings = frozenset(text[:length] for text in self.texts for length in range(1, len(text)))
        self._longest = max(map(len, self.texts), default=0)
        self._first = re.compile("|".join(sorted({re.escape(text[0]) for text in self.texts})) or r"(?!)")

    def find(self, text: str, start: int) -> tuple[int, int]:
        """The range ``[begin, end)`` of the first marker from ``start`` on.

        If there is none, ``begin == end`` is the position of a marker's possible beginning at the end of the text, or
        the text's end.
        """
        if match := self._pattern.search(text, start):
            return match.span()
        at = max(start, len(text) - self._longest + 1)
        while match := self._first.search(text, at):
            if text[match.start() :] in self._beginnings:
                return match.start(), match.start()
            at = match.end()
        return len(text), len(text)


class TextReader:
    """Reads an answer that arrives in pieces.

    After `record`, the text that is read is kept, so that it can become content (`recorded`) if it is not a call.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._has_ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        """Add the next piece of the answer."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """End the answer."""
        self._has_ended = True

    def record(self) -> None:
        """Start recording, with an empty record."""
        self._record = []

    def recorded(self) -> str:
        """The text that was read since `record`. Recording stops."""
        kept, self._record = self._record or [], None
        return "".join(kept)

    def read(self, length: int) -> str:
        """Read ``length`` characters, which must be available."""
        return self.take(self._at + length)

    def take(self, end: int) -> str:
        """Read up to ``end``, a position in the text of `at_hand`."""
        taken = self._text[self._at : end]
        self._at = end
        if self._record is not None:
            self._record.append(taken)
        return taken

    def at_hand(self) -> Steps[tuple[str, int]]:
        """The available text and the position in it. Waits for text unless the answer has ended."""
        while self._at == len(self._text) and not self._has_ended:
            yield None
        return self._text, self._at

    def next_char(self) -> Steps[str]:
        """The next character, without reading it; empty at the answer's end."""
        text, at = yield from self.at_hand()
        return text[at : at + 1]

    def comes(self, text: str) -> Steps[bool]:
        """Whether ``text`` is next, without reading it."""
        while True:
            there = self._text[self._at : self._at + len(text)]
            if there == text:
                return True
            if self._has_ended or not text.startswith(there):
                return False
            yield None

    def comes_behind_space(self, texts: Sequence[str]) -> Steps[bool]:
        """Whether white space and then one of ``texts``, or the answer's end, is next, without reading it."""
        while True:
            match = _SPACE.match(self._text, self._at)
            at = match.end() if match else self._at
            if at - self._at == _MOST_SPACE:
                return False
            if any(self._text.startswith(text, at) for text in texts):
                return True
            if self._has_ended:
                return at == len(self._text)
            rest = self._text[at : at + _MOST_SPACE]
            if not any(text.startswith(rest) for text in texts):
                return False
            yield None

    def literal(self, text: str) -> Steps[bool]:
        """Read ``text`` if it is next. Returns whether it was."""
        if not (yield from self.comes(text)):
            return False
        self.read(len(text))
        return True

    def one_of(self, texts: Sequence[str]) -> Steps[str]:
        """Read the first of ``texts`` that is next, and return it; empty if none is."""
        for text in texts:
            if (yield from self.literal(text)):
                return text
        return ""

    def skip(self, characters: str = " \t\r\n") -> Steps[None]:
        """Read any number of ``characters``."""
        while True:
            text, at = yield from self.at_hand()
            end = at
            while end < len(text) and text[end] in characters:
                end += 1
            self.take(end)
            if end < len(text) or end == at:
                return

    def matching(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read the characters that ``pattern``, a run of one class such as ``[a-z]*``, matches, and return them."""
        pieces = []
        while True:
            text, at = yield from self.at_hand()
            match = pattern.match(text, at)
            end = match.end() if match else at
            pieces.append(self.take(end))
            if end < len(text) or end == at:
                return "".join(pieces)

    def before(self, markers: Markers, event: Callable[[str], OutputEvent] | None) -> Steps[int]:
        """Read text up to the first marker, and return the marker's length; 0 at the answer's end.

        The marker is not read. event: makes an event of each piece of text; None: no events are emitted.
        """
        while True:
            begin, end = markers.find(self._text, self._at)
            if begin == end and self._has_ended:
                begin = end = len(self._text)
            if begin > self._at:
                piece = self.take(begin)
                if event is not None:
                    yield event(piece)
            if begin < end or self._has_ended:
                return end - begin
            yield None

    def text_before(self, markers: Markers) -> Steps[str]:
        """Read and return the text up to the first marker, which is not read."""
        outer, self._record = self._record, []
        yield from self.before(markers, None)
        text = "".join(self._record)
        self._record = outer
        if outer is not None:
            outer.append(text)
        return text

    def until(self, markers: Markers, event: Callable[[str], OutputEvent] | None) -> Steps[str]:
        """Like `before`, but the marker is read and returned; empty at the answer's end."""
        length = yield from self.before(markers, event)
        return self.read(length)


class GeneratorParser:
    """An OutputParser that runs a generator over a TextReader."""

    def __init__(self, steps: Callable[[TextReader], Steps[None]]) -> None:
        self._reader = TextReader()
        self._steps = steps(self._reader)

    def feed(self, text: str) -> list[OutputEvent]:
        self._reader.add(text)
        return self._events()

    def finish(self) -> list[OutputEvent]:
        self._reader.end()
        return self._events()

    def _events(self) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events


class CallSections:
    """Parses sections of one or more calls. A subclass parses one call (`call`).

    opens: markers that begin a section. closes: markers that may end it. names: the only names that make a call; None:
    any name does. at_start: the first character of an answer that begins with a call without a marker; empty: calls
    need a marker.
    """

    separators = " \t\r\n"
    """Characters between the calls of a section."""

    leftovers = " \t\r\n"
    """Characters after the calls that are dropped."""

    def __init__(
        self,
        opens: Sequence[str],
        closes: Sequence[str] = (),
        *,
        names: Collection[str] | None = None,
        at_start: str = "",
    ) -> None:
        self.ends = Markers((*closes, *opens))
        self._opens = Markers(opens)
        self._closes = tuple(closes)
        self._names = names
        self._at_start = at_start
        self._calls = 0

    def call(self, reader: TextReader, marker: str) -> Steps[bool]:
        """Read one call and yield its events. Returns False if there is no call; then no event was yielded, and the
        reader has recorded what was read. After a call, the reader records what belongs to no call.

        marker: the marker before the call; empty for further calls of a section.
        """
        raise NotImplementedError

    def may_call(self, name: str) -> bool:
        """Whether a tool of this name can be called."""
        return bool(name) and (self._names is None or name in self._names)

    def next_index(self) -> int:
        """The index of the next call, which is counted."""
        self._calls += 1
        return self._calls - 1

    def steps(self, reader: TextReader) -> Steps[None]:
        is_unclosed = bool(self._at_start) and (yield from self._calls_at_start(reader))
        while marker := (yield from reader.until(self.ends if is_unclosed else self._opens, ContentText)):
            is_unclosed = marker not in self._closes and (yield from self._section(reader, marker))

    def _calls_at_start(self, reader: TextReader) -> Steps[bool]:
        reader.record()
        yield from reader.skip()
        is_call = yield from reader.comes(self._at_start)
        space = reader.recorded()
        if is_call:
            return (yield from self._section(reader, space))
        yield from _content(space)
        return False

    def _section(self, reader: TextReader, marker: str) -> Steps[bool]:
        """Parse the calls after ``marker``, which has been read. Returns whether a closing marker is still missing."""
        before = self._calls
        reader.record()
        following = marker
        while True:
            yield from reader.skip(self.separators)
            if not (yield from self.call(reader, following)):
                break
            yield from reader.skip()
            following = yield from reader.one_of(self._opens.texts)
        if self._calls == before:
            yield from _content(marker + reader.recorded())
            return False
        yield from reader.skip(self.leftovers)
        left = reader.recorded()
        yield from _content(left if left.strip(self.separators + self.leftovers) else "")
        return not (yield from reader.one_of(self._closes))


def _content(text: str) -> Steps[None]:
    if text:
        yield ContentText(text)
