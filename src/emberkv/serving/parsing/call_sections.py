"""What all formats of tool calls have in common: markers that calls follow, and content where there is no call."""

from collections.abc import Collection, Sequence

from emberkv.serving.parsing.events import ContentText
from emberkv.serving.parsing.reader import Markers, Steps, TextReader


class CallSections:
    """Parses sections of one or more calls; a format says how one call is read (`call`).

    opens: markers that calls follow. closes: markers that may end them. names: of the tools, where no other name makes
    a call; None: any name does. at_start: the character that an answer begins with where it begins with a call without
    a marker; empty: none does.
    """

    separators = " \t\r\n"
    """Characters between the calls of a section."""

    leftovers = " \t\r\n"
    """Characters behind the calls that mean nothing."""

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
        """Read one call and yield its events. False where there is none: nothing was yielded, and the reader has a
        record of what was read. Behind a call, what belongs to none is left in a new record.

        marker: the one that the call follows; empty for further calls of a section.
        """
        raise NotImplementedError

    def may_call(self, name: str) -> bool:
        """Whether a call of ``name`` is one."""
        return bool(name) and (self._names is None or name in self._names)

    def next_index(self) -> int:
        """The index of a call that begins."""
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
        """The calls behind ``marker``, which has been read. Returns whether the marker that closes them is to come."""
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
