"""Stop strings: where an answer's text ends, however the text was cut into pieces."""

from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop string is complete, and never passes on a part of one.

    The stop string that is complete first wins; of two that end together, the longer. So the outcome depends
    on the text alone, not on the pieces in which it came. Scanning takes time in proportion to the text and to the
    number of stop strings, whatever they are (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_StopMatcher(stop) for stop in stops]
        self._held = ""  # the longest end of the text so far that may be the beginning of a stop string
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now certain to belong to the answer; none after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        ends = [(end, stop) for stop in self._stops if (end := stop.push(piece)) is not None]
        if ends:
            end, stop = min(ends, key=lambda each: (each[0], -len(each[1].text)))
            self.matched = stop.text
            start = len(self._held) + end - len(stop.text)
            self._held = ""
            return text[:start]
        certain = len(text) - max(stop.length for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


class _StopMatcher:
    """Finds one stop string. length: of its longest beginning that the text so far ends with."""

    __slots__ = ("_fallbacks", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._fallbacks = [
            0,
            0,
        ]  # by length of a beginning: the longest shorter one that it ends with, as far as needed

    def push(self, piece: str) -> int | None:
        """Where in ``piece`` the stop string is complete for the first time: the position behind it."""
        if not self.length and self.text[0] not in piece:
            return None
        for at, char in enumerate(piece):
            self.length = self._longer(self.length, char)
            if self.length == len(self.text):
                return at + 1
            if self.length >= len(self._fallbacks):
                self._fallbacks.append(self._longer(self._fallbacks[-1], char))
        return None

    def _longer(self, length: int, char: str) -> int:
        """The longest beginning that the text ends with after ``char``, if before it was the one of ``length``."""
        while length and self.text[length] != char:
            length = self._fallbacks[length]
        return length + 1 if self.text[length] == char else 0
