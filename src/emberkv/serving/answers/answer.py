"""One answer in the making: token outputs in, certain text out. No event loop, no threads."""

from collections import deque
from dataclasses import dataclass

from emberkv.core.sequence import FinishReason
from emberkv.engine.request import CacheUsage, TokenLogprobs, TokenOutput
from emberkv.engine.tokenizer import IncrementalDetokenizer
from emberkv.serving.answers.echo import Echo
from emberkv.serving.answers.stop_strings import StopScanner


@dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """A token's log-probabilities and where its text lies in the answer, in characters: ``[start, end)``."""

    start: int
    end: int
    token: TokenLogprobs


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What an answer has gained. ``finish_reason`` is set on the last one."""

    index: int
    text: str
    logprobs: tuple[PlacedLogprobs, ...]
    finish_reason: FinishReason | None


class Answer:
    """Decodes one request's outputs, ends it at a stop string, and keeps its figures.

    A token's log-probabilities are given out with the text that the token begins, so that those of a stop
    string, like the stop string itself, are not. silent: no token is wanted, so the answer ends, empty, at the first.
    echo: what comes before the answer's own text.
    """

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        detokenizer: IncrementalDetokenizer,
        stops: tuple[str, ...],
        *,
        silent: bool = False,
        echo: Echo | None = None,
    ) -> None:
        self.index = index
        self.silent = silent
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
        self._logprobs: deque[PlacedLogprobs] = deque()

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer."""
        return self._scanner.matched

    def absorb(self, output: TokenOutput) -> None:
        """Take one step's tokens. Outputs after the end, as after a stop string, are ignored."""
        if self.finish_reason is not None:
            return
        self.usage = output.usage or self.usage
        if self._echo is not None:
            self._give_back(self._echo, output.prompt_logprobs)
            self._echo = None
        if self.silent and (output.token_ids or output.finish_reason is FinishReason.STOP):
            self.finish_reason = FinishReason.LENGTH
            return
        for position, token_id in enumerate(output.token_ids):
            self.completion_tokens += 1
            self._add(self._detokenizer.push((token_id,)), output.logprobs[position : position + 1])
            if self.stop_sequence is not None:
                self.finish_reason = FinishReason.STOP
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
        if self.stop_sequence is not None:
            self.finish_reason = FinishReason.STOP
            return
        self._pass_on(self._scanner.flush())
        self.finish_reason = output.finish_reason
        self.error = output.error

    def _add(self, text: str, logprobs: tuple[TokenLogprobs, ...]) -> None:
        start = self._decoded
        self._decoded += len(text)
        self._logprobs.extend(PlacedLogprobs(start, self._decoded, token) for token in logprobs)
        self._pass_on(self._scanner.push(text))

    def _pass_on(self, text: str) -> None:
        if text:
            self._passed += len(text)
            self._new_text.append(text)

    def take(self) -> AnswerDelta | None:
        """What is new since the last call; None when there is nothing to tell."""
        logprobs = self._take_logprobs() if self._logprobs else ()
        text = "".join(self._new_text)
        if not (text or logprobs or self.finish_reason):
            return None
        self._new_text.clear()
        return AnswerDelta(self.index, text, logprobs, self.finish_reason)

    def _take_logprobs(self) -> tuple[PlacedLogprobs, ...]:
        taken = []
        while self._logprobs and self._may_give_out(self._logprobs[0]):
            taken.append(self._logprobs.popleft())
        return tuple(taken)

    def _may_give_out(self, placed: PlacedLogprobs) -> bool:
        if self.stop_sequence is not None:
            return placed.start < self._passed
        return placed.end <= self._passed or self.finish_reason is not None
