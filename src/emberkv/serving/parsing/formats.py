"""The formats of model output by name, the choice among them by the chat template, and their parsers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from emberkv.errors import ConfigError
from emberkv.serving.parsing.events import (
    ContentText,
    MessageBuilder,
    OutputEvent,
    OutputParser,
    ParsedMessage,
    joined,
)
from emberkv.serving.parsing.json_calls import ObjectCalls
from emberkv.serving.parsing.reader import GeneratorParser, Steps, TextReader
from emberkv.serving.parsing.reasoning import ThoughtTags, WhiteSpace

ToolSchema = Mapping[str, Any]
"""A tool as chat templates take it: ``{"type": "function", "function": {"name", "parameters"}}``."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes tool calls.

    steps: makes the parser for a request's tools. hints: a template of the family has all texts of one of these.
    special: texts of its markup that may be special tokens, which the detokenizer must not leave out.
    """

    steps: Callable[[Sequence[ToolSchema]], Callable[[TextReader], Steps[None]]]
    hints: tuple[tuple[str, ...], ...]
    special: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models marks its thoughts. hints: as for `ToolFormat`."""

    tags: ThoughtTags
    hints: tuple[tuple[str, ...], ...]


def _hermes(tools: Sequence[ToolSchema]) -> Callable[[TextReader], Steps[None]]:
    return ObjectCalls(("\n<tool_call>", "<tool_call>"), ("</tool_call>",)).steps


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(_hermes, (("<tool_call>", "arguments"),), ("<tool_call>", "</tool_call>")),
}
"""By name, the particular before the general: the first whose hints a template has is its format."""

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "think": ReasoningFormat(ThoughtTags(), (("<think>",), ("</think>",))),
}

NONE = "none"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes calls and thoughts. tools, reasoning: names of formats; None: no such markup is looked for.

    >>> parser = OutputFormat("hermes", "think").parser(tools=[], in_reasoning=True)
    >>> parser.feed("So.</think>Hello")
    [ReasoningText(text='So.'), ContentText(text='Hello')]
    """

    tools: str | None = None
    reasoning: str | None = None

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts of markup; where they are special tokens, the detokenizer must not leave them out."""
        tags = [REASONING_FORMATS[self.reasoning].tags] if self.reasoning else []
        calls = TOOL_FORMATS[self.tools].special if self.tools else ()
        return frozenset((*calls, *(text for each in tags for text in (each.begin, each.end))))

    @property
    def reads_special_tokens(self) -> bool:
        return bool(self.special_tokens)

    def parser(self, *, tools: Sequence[ToolSchema], in_reasoning: bool) -> OutputParser:
        """A parser of one answer.

        tools: those of the request; without any, call markup is content. in_reasoning: whether the prompt ends inside
        a thought (`ends_in_reasoning`).
        """
        calls = TOOL_FORMATS[self.tools].steps(tools) if self.tools and tools else None
        tags = REASONING_FORMATS[self.reasoning].tags if self.reasoning else None
        return _AnswerParser(
            None if tags is None else GeneratorParser(partial(tags.steps, in_reasoning=in_reasoning)),
            None if calls is None else GeneratorParser(calls),
        )

    def ends_in_reasoning(self, prompt: str, begun: str = "") -> bool:
        """Whether a rendered prompt ends inside a thought. begun: its end that is the beginning of the answer."""
        if not self.reasoning:
            return False
        tags = REASONING_FORMATS[self.reasoning].tags
        opened = prompt[: len(prompt) - len(begun)].rstrip().endswith(tags.begin.rstrip())
        last_begin, last_end = begun.rfind(tags.begin), begun.rfind(tags.end)
        return last_end < 0 and opened if last_begin < 0 else last_begin > last_end


class _AnswerParser:
    """Thoughts first, then calls in what is left, then white space."""

    def __init__(self, thoughts: OutputParser | None, calls: OutputParser | None) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._white_space = WhiteSpace()

    def feed(self, text: str) -> list[OutputEvent]:
        if not text:
            return []
        parts = [ContentText(text)] if self._thoughts is None else self._thoughts.feed(text)
        return joined(self._white_space.tidy(self._with_calls(parts)))

    def finish(self) -> list[OutputEvent]:
        parts = [] if self._thoughts is None else self._thoughts.finish()
        events = self._with_calls(parts)
        if self._calls is not None:
            events += self._calls.finish()
        return joined((*self._white_space.tidy(events), *self._white_space.rest()))

    def _with_calls(self, parts: Iterable[OutputEvent]) -> list[OutputEvent]:
        if self._calls is None:
            return list(parts)
        events: list[OutputEvent] = []
        for part in parts:
            events += self._calls.feed(part.text) if isinstance(part, ContentText) else [part]
        return events


def detect_format(chat_template: str | None) -> OutputFormat:
    """The format of a chat template's models, by the markup that it writes; None for what is not found."""
    text = chat_template or ""
    tools = (name for name, each in TOOL_FORMATS.items() if _has(text, each.hints))
    reasoning = (name for name, each in REASONING_FORMATS.items() if _has(text, each.hints))
    return OutputFormat(next(tools, None), next(reasoning, None))


def _has(text: str, hints: tuple[tuple[str, ...], ...]) -> bool:
    return any(all(hint in text for hint in each) for each in hints)


def output_format(tools: str | None, reasoning: str | None) -> OutputFormat:
    """The format of these names; None or "none": such markup is left as content.

    Raises ConfigError for an unknown name, which it lists the known ones for.
    """
    return OutputFormat(
        _known(tools, TOOL_FORMATS, "--tool-parser"), _known(reasoning, REASONING_FORMATS, "--reasoning-parser")
    )


def _known(name: str | None, formats: Mapping[str, object], option: str) -> str | None:
    if name is None or name == NONE:
        return None
    if name not in formats:
        raise ConfigError(f"{option} is {name!r}; accepted are auto, none, {', '.join(formats)}")
    return name


def parse_output(
    output_format: OutputFormat, text: str, *, tools: Sequence[ToolSchema] = (), in_reasoning: bool = False
) -> ParsedMessage:
    """A whole answer at once."""
    parser = output_format.parser(tools=tools, in_reasoning=in_reasoning)
    builder = MessageBuilder()
    builder.add(parser.feed(text))
    builder.add(parser.finish())
    return builder.message()
