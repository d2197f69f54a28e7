"""Stop strings: where an answer's text ends, however the text was cut into pieces."""

from collections.abc import Sequence


class StopScanner:
    """Passes text on until a stop string is complete, and never passes on a part of one.

    The stop string that is complete first wins; of two that end together, the longer. So the outcome depends
    on the text alone, not on the pieces in which it came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the longest end of the text so far that may be the beginning of a stop string
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now certain to belong to the answer; none after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            return text[:start]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, and not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
