"""gpt-oss's Harmony format: an answer is several messages, each with a header that names its channel and recipient.

The `openai-harmony` library is not used, as it parses token ids and downloads its vocabulary.
"""

import re
from collections.abc import Callable

from emberkv.serving.parsing.events import CallBegin, ContentText, OutputEvent, ReasoningText
from emberkv.serving.parsing.json_calls import stream_arguments
from emberkv.serving.parsing.reader import Markers, Steps, TextReader

BEGIN, CHANNEL, CONSTRAIN, BODY = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
SPECIAL_TOKENS = (BEGIN, CHANNEL, CONSTRAIN, BODY, *ENDS)

_HEADER_STARTS = (BEGIN, CHANNEL, " to=")
_TO = r"(?:\s*to=[\w.\-]+)?"
_HEADER = re.compile(
    rf"(?:<\|start\|>assistant)?{_TO}(?:<\|channel\|>(?:analysis|commentary|final))?{_TO}"
    r"\s*(?:<\|constrain\|>)?(?:json)?\s*"
)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.\-]+)")


class HarmonyMessages:
    """Parses messages: reasoning is on the channel "analysis", calls are messages to a function, all else is content.

    has_tools, reasoning: whether calls and reasoning are parsed; if not, they are content. A message with an unknown
    header is content.
    """

    def __init__(self, *, has_tools: bool, reasoning: bool) -> None:
        self._has_tools = has_tools
        self._reasoning = reasoning
        self._calls = 0
        self._body = Markers((BODY,))
        self._ends = Markers((*ENDS, BEGIN, CHANNEL))
        self._headers = Markers((BEGIN, CHANNEL))

    def steps(self, reader: TextReader) -> Steps[None]:
        starts_with_header = yield from self._at_header(reader)
        if not starts_with_header:
            yield from reader.before(self._headers, ContentText)
        while (yield from reader.next_char()):
            yield from self._message(reader)

    def _at_header(self, reader: TextReader) -> Steps[bool]:
        for start in _HEADER_STARTS:
            if (yield from reader.comes(start)):
                return True
        return False

    def _message(self, reader: TextReader) -> Steps[None]:
        """Parse one message and the marker that ends it."""
        header = yield from reader.text_before(self._body)
        if not (yield from reader.literal(BODY)):
            yield ContentText(header)
            return
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        is_known = _HEADER.fullmatch(header) is not None
        if recipient is not None and is_known and self._has_tools:
            index = self._calls
            self._calls += 1
            yield CallBegin(index, recipient[1].removeprefix("functions."), None)
            yield from stream_arguments(reader, index, self._ends)
            yield from reader.skip()
            yield from reader.before(self._ends, ContentText)
        else:
            if recipient is not None or not is_known:
                yield ContentText(header + BODY)
            is_thought = (
                self._reasoning and is_known and recipient is None and channel is not None and channel[1] == "analysis"
            )
            event: Callable[[str], OutputEvent] = ReasoningText if is_thought else ContentText
            yield from reader.before(self._ends, event)
        yield from reader.one_of(ENDS)
