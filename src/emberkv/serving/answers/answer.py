"""One answer as it is generated: token outputs in; text, its reasoning and tool calls, and cache usage out. It needs no
event loop and no threads.
"""

import random
import string
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, TokenLogprobs, TokenOutput
from emberkv.engine.tokenization.tokenizer import IncrementalDetokenizer, Tokenizer
from emberkv.serving.answers.answer_memory import AnswerRecorder
from emberkv.serving.parsing.events import (
    CallBegin,
    CallEnd,
    MessageBuilder,
    OutputEvent,
    ParsedMessage,
    ReasoningText,
)
from emberkv.serving.parsing.formats import OutputFormat, ToolSchema


@dataclass(frozen=True, slots=True)
class Echo:
    """starts: of each prompt token, where its text begins, in characters of ``text``."""

    text: str
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """A token's log-probabilities and where its text lies in the answer, in characters: ``[start, end)``."""

    start: int
    end: int
    token: TokenLogprobs


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What an answer has gained since the delta before. Each API's response writer maps it to the API's wire form.

    index: of the answer among those to one HTTP request. text: as the model writes it. finish_reason: set on the last
    delta. events: what the text means, where it is parsed; a piece of text may wait for the next ones to be understood.
    """

    index: int
    text: str
    logprobs: tuple[PlacedLogprobs, ...]
    finish_reason: FinishReason | None
    events: tuple[OutputEvent, ...] = ()


class AnswerState(Protocol):
    """What writers of messages need of an answer, wherever it is made: see `Answer`."""

    @property
    def usage(self) -> CacheUsage: ...

    @property
    def completion_tokens(self) -> int: ...

    @property
    def reasoning_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason | None: ...

    @property
    def stop_sequence(self) -> str | None: ...

    @property
    def calls(self) -> int: ...

    @property
    def wants_no_tokens(self) -> bool: ...


_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 24
_SOURCE = random.SystemRandom()


def new_call_id(prefix: str, source: random.Random = _SOURCE) -> str:
    """The id of a tool call: ``prefix`` and 24 letters or digits that ``source`` draws."""
    return prefix + "".join(source.choices(_ID_CHARACTERS, k=_ID_LENGTH))


def openai_call_id() -> str:
    return new_call_id("call_")


@dataclass(frozen=True, slots=True)
class OutputParsing:
    """How the text of one answer is parsed.

    tools: those of the request that the answer may call; without any, the markup of calls is content. in_reasoning:
    whether the prompt ends inside a thought. parallel: False ends the answer behind its first call. new_call_id: makes
    the ids of calls to which the model gives none.
    """

    output_format: OutputFormat
    tools: Sequence[ToolSchema] = ()
    in_reasoning: bool = False
    parallel: bool = True
    new_call_id: Callable[[], str] = openai_call_id

    @property
    def special_tokens(self) -> frozenset[str]:
        """Those that the parser reads, by their text."""
        return self.output_format.special_tokens


class ParsedOutput:
    """Parses one answer as it grows.

    reasoning_tokens: tokens of the reasoning, markup included. calls: how many have begun. has_whole_call: whether the
    last call that has ended is complete. has_ended: whether the answer has had its only allowed call, and ends there.
    """

    def __init__(self, parsing: OutputParsing) -> None:
        self.reasoning_tokens = 0
        self.calls = 0
        self.has_whole_call = False
        self.has_ended = False
        self._parsing = parsing
        self._parser = parsing.output_format.parser(tools=parsing.tools, in_reasoning=parsing.in_reasoning)
        self._events: list[OutputEvent] = []
        self._message = MessageBuilder()
        self._undecided = 0  # tokens since the last event

    def count_token(self) -> None:
        """Count a token. Its text may arrive with later tokens, so it belongs to the next event."""
        self._undecided += 1

    def add(self, text: str) -> None:
        """Parse the next text of the answer."""
        if not self.has_ended:
            self._take_in(self._parser.feed(text))

    def finish(self) -> None:
        """End the text."""
        if not self.has_ended:
            self._take_in(self._parser.finish())

    @property
    def message(self) -> ParsedMessage:
        """All events so far, as a message."""
        return self._message.message()

    def take(self) -> tuple[OutputEvent, ...]:
        """The events since the last call."""
        taken = tuple(self._events)
        self._events.clear()
        return taken

    def _take_in(self, events: list[OutputEvent]) -> None:
        for event in events:
            known = self._with_id(event) if isinstance(event, CallBegin) else event
            self._events.append(known)
            self._message.add((known,))
            if isinstance(event, CallEnd):
                self.has_whole_call = event.is_complete
                if not self._parsing.parallel:
                    self.has_ended = True
                    break
        if events:
            self.reasoning_tokens += self._undecided * isinstance(self._events[-1], ReasoningText)
            self._undecided = 0

    def _with_id(self, call: CallBegin) -> CallBegin:
        self.calls += 1
        return CallBegin(call.index, call.name, call.call_id or self._parsing.new_call_id())


_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


class Answer:
    """Decodes one request's outputs, ends the answer at a stop string, and keeps its usage.

    A token's log-probabilities are given out with the text that the token begins, so that those of a stop
    string, like the stop string itself, are not. wants_no_tokens: ``max_tokens`` is 0, so the
    answer ends, empty, at the first token. echo: what comes before the answer's own text. parsing: how the text is
    parsed; None: it is not. min_tokens: within so many, no stop string is looked for. recorder: remembers an answer
    that is parsed and that no stop string ends.
    """

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        detokenizer: IncrementalDetokenizer,
        stops: tuple[str, ...],
        *,
        wants_no_tokens: bool = False,
        echo: Echo | None = None,
        parsing: OutputParsing | None = None,
        min_tokens: int = 0,
        recorder: AnswerRecorder | None = None,
    ) -> None:
        self.index = index
        self.wants_no_tokens = wants_no_tokens
        self._echo = echo
        self.usage = CacheUsage(prompt_tokens, cached_tokens=0)
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops)
        self._decoded = 0  # characters out of the detokenizer
        self._passed = 0  # of these, characters given out
        self._new_text: list[str] = []
        self._output = None if parsing is None else ParsedOutput(parsing)
        self._min_tokens = min_tokens
        self._recorder = recorder
        self._sampled: list[int] = []
        self._said: list[str] = []
        self._logprobs: deque[PlacedLogprobs] = deque()

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer."""
        return self._scanner.matched

    @property
    def ended_early(self) -> bool:
        """Whether the text has ended the answer, and not the engine."""
        return self.stop_sequence is not None or (self._output is not None and self._output.has_ended)

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._output is None else self._output.reasoning_tokens

    @property
    def calls(self) -> int:
        """How many tool calls the answer has begun."""
        return 0 if self._output is None else self._output.calls

    @property
    def message(self) -> ParsedMessage:
        """What the text so far means; empty where it is not parsed."""
        return ParsedMessage() if self._output is None else self._output.message

    @property
    def is_cut_in_call(self) -> bool:
        """Whether a stop string lies within the last tool call."""
        return self.stop_sequence is not None and self._output is not None and not self._output.has_whole_call

    def absorb(self, output: TokenOutput) -> None:
        """Take one step's tokens. Outputs after the end, as after a stop string, are ignored."""
        if self.finish_reason is not None:
            return
        self.usage = output.usage or self.usage
        if self._echo is not None:
            self._give_back(self._echo, output.prompt_logprobs)
            self._echo = None
        if self.wants_no_tokens and (output.token_ids or output.finish_reason is FinishReason.STOP):
            self.finish_reason = FinishReason.LENGTH
            return
        for position, token_id in enumerate(output.token_ids):
            self.completion_tokens += 1
            if self._recorder is not None:
                self._sampled.append(token_id)
            if self._output is not None:
                self._output.count_token()
            self._add(self._detokenizer.push((token_id,)), output.logprobs[position : position + 1])
            if self.ended_early:
                self._finish(FinishReason.STOP)
                return
        if output.finish_reason is not None:
            self._end(output)

    def _give_back(self, echo: Echo, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """The prompt is no part of what stop strings are looked for in, but of what offsets count."""
        if logprobs:
            placed = zip(echo.starts, (*echo.starts[1:], len(echo.text)), logprobs, strict=True)
            self._logprobs.extend(PlacedLogprobs(start, end, token) for start, end, token in placed)
        self._decoded += len(echo.text)
        self._pass_on(echo.text)

    def _end(self, output: TokenOutput) -> None:
        self._add(self._detokenizer.flush(), ())
        if not self.ended_early:
            self._pass_on(self._scanner.flush())
        self._finish(FinishReason.STOP if self.ended_early else output.finish_reason)
        self.error = output.error

    def _finish(self, reason: FinishReason | None) -> None:
        if self._output is not None:
            self._output.finish()
            if self._recorder is not None and self.stop_sequence is None and reason in _WHOLE:
                self._recorder.record(self._output.message, "".join(self._said), self._sampled)
        self.finish_reason = reason

    def _add(self, text: str, logprobs: tuple[TokenLogprobs, ...]) -> None:
        start = self._decoded
        self._decoded += len(text)
        self._logprobs.extend(PlacedLogprobs(start, self._decoded, token) for token in logprobs)
        is_scanned = self.completion_tokens > self._min_tokens
        self._pass_on(self._scanner.push(text) if is_scanned else text)

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        self._passed += len(text)
        self._new_text.append(text)
        if self._recorder is not None:
            self._said.append(text)
        if self._output is not None:
            self._output.add(text)

    def take(self) -> AnswerDelta | None:
        """What is new since the last call; None if nothing is, or only text that is not understood yet."""
        logprobs = self._take_logprobs() if self._logprobs else ()
        events = () if self._output is None else self._output.take()
        has_news = self._new_text if self._output is None else events
        if not (has_news or logprobs or self.finish_reason):
            return None
        text = "".join(self._new_text)
        self._new_text.clear()
        return AnswerDelta(self.index, text, logprobs, self.finish_reason, events)

    def _take_logprobs(self) -> tuple[PlacedLogprobs, ...]:
        taken = []
        while self._logprobs and self._may_give_out(self._logprobs[0]):
            taken.append(self._logprobs.popleft())
        return tuple(taken)

    def _may_give_out(self, placed: PlacedLogprobs) -> bool:
        if self.stop_sequence is not None:
            return placed.start < self._passed
        return placed.end <= self._passed or self.finish_reason is not None


def echo_of(prompt: str | Sequence[int], token_ids: Sequence[int], tokenizer: Tokenizer) -> Echo:
    """A prompt that came as text is given back as it came; one of token ids as an answer of these would read.

    A token whose text is not in the prompt, as one that begins every text, has no width. Where a tokenizer changes what
    it reads (to lower case, say), starts are as far as its own text reaches.
    """
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push((token_id,)) for token_id in token_ids]
    text = prompt if isinstance(prompt, str) else "".join(pieces) + detokenizer.flush()
    starts: list[int] = []
    at = 0
    for token_id, piece in zip(token_ids, pieces, strict=True):
        starts.append(at)
        special = "" if piece or not isinstance(prompt, str) else tokenizer.token_text(token_id)
        if special and text.startswith(special, at):  # detokenizers leave special tokens out
            at += len(special)
        at = min(at + len(piece), len(text))
    return Echo(text, tuple(starts))


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
