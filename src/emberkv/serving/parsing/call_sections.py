"""The common part of the parsers of tool calls: sections of calls that follow a marker, and content around them."""

from collections.abc import Collection, Sequence

from emberkv.serving.parsing.events import ContentText
from emberkv.serving.parsing.reader import Markers, Steps, TextReader


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
