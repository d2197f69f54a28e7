"""The text of an answer as a parser reads it: with a position, and waiting where the next character has not come yet.

A parser is a generator. It reads through `TextReader`, yields events, and yields None where it needs more text, so that
each format reads like a parser of a whole text. What is read is dropped at once: nothing is scanned twice.
"""

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from emberkv.serving.parsing.events import OutputEvent

Result = TypeVar("Result")
Steps = Generator[OutputEvent | None, None, Result]
"""A part of a parser: yields events, or None to wait for text, and returns a result."""


_MOST_SPACE = 64
"""Characters that are looked at ahead of what is read."""
_SPACE = re.compile(rf"\s{{0,{_MOST_SPACE}}}")


class Markers:
    """Literal texts that are looked for together. None may begin with another one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.texts, key=len, reverse=True))) or r"(?!)")
        self._beginnings = frozenset(text[:length] for text in self.texts for length in range(1, len(text)))
        self._longest = max(map(len, self.texts), default=0)
        self._first = re.compile("|".join(sorted({re.escape(text[0]) for text in self.texts})) or r"(?!)")

    def find(self, text: str, start: int) -> tuple[int, int]:
        """Where the first marker lies from ``start`` on: ``[begin, end)``.

        Without one, ``begin == end`` is where a marker may begin whose rest is still to come, else the text's end.
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
    """Reads an answer that comes in pieces.

    While it records (`record`), what is read is kept, so that it can still be passed on as content when it turns out to
    be no call (`recorded`).
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._has_ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """No more text will come."""
        self._has_ended = True

    def record(self) -> None:
        """Keep what is read from here on."""
        self._record = []

    def recorded(self) -> str:
        """What was read since `record`; it is no longer kept."""
        kept, self._record = self._record or [], None
        return "".join(kept)

    def read(self, length: int) -> str:
        """Read so many characters, which have come."""
        return self.take(self._at + length)

    def take(self, end: int) -> str:
        """Read what lies before ``end``, a position in the text at hand."""
        taken = self._text[self._at : end]
        self._at = end
        if self._record is not None:
            self._record.append(taken)
        return taken

    def at_hand(self) -> Steps[tuple[str, int]]:
        """The text that has come and the position in it, waiting while there is none; at the answer's end, no text."""
        while self._at == len(self._text) and not self._has_ended:
            yield None
        return self._text, self._at

    def next_char(self) -> Steps[str]:
        """The next character, which is not read; empty at the answer's end."""
        text, at = yield from self.at_hand()
        return text[at : at + 1]

    def comes(self, text: str) -> Steps[bool]:
        """Whether ``text`` comes next; it is not read."""
        while True:
            there = self._text[self._at : self._at + len(text)]
            if there == text:
                return True
            if self._has_ended or not text.startswith(there):
                return False
            yield None

    def comes_behind_space(self, texts: Sequence[str]) -> Steps[bool]:
        """Whether one of ``texts``, or the answer's end, comes next behind white space; nothing is read."""
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
        """Read ``text`` if it comes next; nothing if something else does."""
        if not (yield from self.comes(text)):
            return False
        self.read(len(text))
        return True

    def one_of(self, texts: Sequence[str]) -> Steps[str]:
        """Read the first of ``texts`` that comes next, and return it; empty where none does."""
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
        """Pass text on as events up to the first of the markers, and return its length; 0 at the answer's end.

        The marker is not read. event: makes the event of a piece; None: the text is only read.
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
        """The text up to the first of the markers, once it is whole; the marker is not read."""
        outer, self._record = self._record, []
        yield from self.before(markers, None)
        text = "".join(self._record)
        self._record = outer
        if outer is not None:
            outer.append(text)
        return text

    def until(self, markers: Markers, event: Callable[[str], OutputEvent] | None) -> Steps[str]:
        """As `before`; the marker is read, too, and returned: empty at the answer's end."""
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
