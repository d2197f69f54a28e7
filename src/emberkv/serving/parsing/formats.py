"""The formats of tool calls and reasoning by name, their detection in chat templates, and their parsers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from emberkv.errors import ConfigError
from emberkv.serving.parsing import harmony, tagged_calls
from emberkv.serving.parsing.events import (
    CallBegin,
    CallEnd,
    ContentText,
    MessageBuilder,
    OutputEvent,
    OutputParser,
    ParsedMessage,
    ReasoningText,
    joined,
)
from emberkv.serving.parsing.harmony import HarmonyMessages
from emberkv.serving.parsing.json_calls import DeepSeekCalls, FunctionTagCalls, KimiCalls, MistralCalls, ObjectCalls
from emberkv.serving.parsing.literal_calls import GemmaCalls, PythonCalls
from emberkv.serving.parsing.reader import GeneratorParser, Markers, Steps, TextReader
from emberkv.serving.parsing.schema_values import ParameterTypes
from emberkv.serving.parsing.tagged_calls import TaggedCalls, TagSyntax

_NOTHING = Markers(())


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """The tags around reasoning, which comes first in an answer.

    trimmed: characters that templates strip from both ends of reasoning and from the beginning of the content.
    interrupts: markers that end reasoning, too, and belong to the content. begins_inside: whether every answer begins
    within reasoning, whatever the prompt ends with.
    """

    begin: str = "<think>"
    end: str = "</think>"
    trimmed: str = "\n"
    interrupts: tuple[str, ...] = ()
    begins_inside: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The tags, without the word and line break that belong to the opening tag of some formats."""
        return (self.begin.removesuffix("thought\n"), self.end)

    def steps(self, reader: TextReader, *, in_reasoning: bool) -> Steps[None]:
        """Yield reasoning as ReasoningText, and all other text as ContentText."""
        reader.record()
        yield from reader.skip()
        has_tag = yield from reader.literal(self.begin)
        before = reader.recorded()
        if has_tag or in_reasoning or self.begins_inside:
            yield from self._thought(reader)
        elif before:
            yield ContentText(before)
        yield from reader.until(_NOTHING, ContentText)

    def _thought(self, reader: TextReader) -> Steps[None]:
        yield from reader.skip(self.trimmed)
        ends = (self.end, *self.interrupts)
        stops = Markers((*ends, *self.trimmed))
        while (yield from reader.before(stops, ReasoningText)):
            reader.record()
            yield from reader.skip(self.trimmed)
            cut = reader.recorded()
            marker = yield from reader.one_of(ends)
            if marker == self.end:
                yield from reader.skip(self.trimmed)
                return
            if marker:
                yield ContentText(marker)
                return
            if (yield from reader.next_char()):
                yield ReasoningText(cut)


class WhiteSpace:
    """Drops content that is only white space before, between and after calls."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._has_call = False
        self._is_blank = True

    def tidy(self, events: Iterable[OutputEvent]) -> Iterator[OutputEvent]:
        for event in events:
            match event:
                case ContentText(text):
                    if self._is_blank and not text.strip():
                        self._held.append(text)
                        continue
                    self._is_blank = False
                    yield ContentText("".join((*self._held, text))) if self._held else event
                    self._held.clear()
                case CallBegin():
                    self._held.clear()
                    self._has_call = True
                    yield event
                case CallEnd():
                    self._is_blank = True
                    yield event
                case _:
                    yield event

    def rest(self) -> Iterator[OutputEvent]:
        """The white space that was held back, at the answer's end, if the answer has no call."""
        if self._held and not self._has_call:
            yield ContentText("".join(self._held))


ToolSchema = Mapping[str, Any]
"""A tool in the form of chat templates: ``{"type": "function", "function": {"name", "parameters"}}``."""


ParserSteps = Callable[[TextReader], Steps[None]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The tool call format of a family of models.

    steps: returns the parser for a request's tools. hints: groups of texts; a template that has all texts of one group
    is of this family. special: markup that may be special tokens, which the detokenizer must keep.
    """

    steps: Callable[[ParameterTypes], ParserSteps]
    hints: tuple[tuple[str, ...], ...]
    special: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The reasoning format of a family of models. hints: as in `ToolFormat`."""

    tags: ThoughtTags
    hints: tuple[tuple[str, ...], ...] = ()


HARMONY = "harmony"
_HERMES_TAGS = ("<tool_call>", "</tool_call>")


def _objects(
    opens: Sequence[str], closes: Sequence[str], hints: tuple[tuple[str, ...], ...], special: tuple[str, ...] = ()
) -> ToolFormat:
    return ToolFormat(lambda _: ObjectCalls(opens, closes).steps, hints, special or (*opens, *closes))


def _tagged(syntax: TagSyntax, hints: tuple[tuple[str, ...], ...]) -> ToolFormat:
    texts = (*syntax.opens, *syntax.closes, syntax.key, syntax.key_end, syntax.value_end)
    special = tuple(text.lstrip("\n") for text in texts)
    return ToolFormat(lambda types: TaggedCalls(syntax, types).steps, hints, special)


def _llama_json(types: ParameterTypes) -> ParserSteps:
    return ObjectCalls(("<|python_tag|>",), names=types.names, at_start="{").steps


def _pythonic(types: ParameterTypes) -> ParserSteps:
    return PythonCalls(("<|python_start|>",), ("<|python_end|>",), names=types.names, at_start="[").steps


def _lfm2(types: ParameterTypes) -> ParserSteps:
    return PythonCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",), names=types.names).steps


def _fenced_python(types: ParameterTypes) -> ParserSteps:
    return PythonCalls(("```tool_code\n",), ("\n```", "```"), names=types.names).steps


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    HARMONY: ToolFormat(
        lambda _: HarmonyMessages(has_tools=True, reasoning=False).steps,
        (("<|channel|>", "<|message|>"),),
        harmony.SPECIAL_TOKENS,
    ),
    "deepseek-dsml": _tagged(tagged_calls.DEEPSEEK, (("｜DSML｜",),)),
    "deepseek": ToolFormat(
        lambda _: DeepSeekCalls().steps,
        (("<｜tool▁calls▁begin｜>",),),
        tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
    ),
    "kimi": ToolFormat(
        lambda _: KimiCalls().steps,
        (("<|tool_calls_section_begin|>",),),
        tuple(
            f"<|tool_call{name}|>" for name in ("s_section_begin", "_begin", "_argument_begin", "_end", "s_section_end")
        ),
    ),
    "minimax-m2": _tagged(tagged_calls.MINIMAX, (("<minimax:tool_call>",),)),
    "minimax-m1": _objects(("\n<tool_calls>", "<tool_calls>"), ("</tool_calls>",), (("<tool_calls>",),)),
    "mistral": ToolFormat(
        lambda _: MistralCalls().steps, (("[TOOL_CALLS]",),), ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    ),
    "gemma": ToolFormat(
        lambda _: GemmaCalls(("<|tool_call>",), ("<tool_call|>",), '<|"|>').steps,
        (("<|tool_call>",),),
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    "functiongemma": ToolFormat(
        lambda _: GemmaCalls(("<start_function_call>",), ("<end_function_call>",), "<escape>").steps,
        (("<start_function_call>",),),
        ("<start_function_call>", "<end_function_call>", "<escape>"),
    ),
    "gemma-python": ToolFormat(_fenced_python, (("tool_code",),)),
    "cohere": _objects(("<|START_ACTION|>",), ("<|END_ACTION|>",), (("<|START_ACTION|>",),)),
    "nemotron": _objects(("<TOOLCALL>",), ("</TOOLCALL>",), (("<TOOLCALL>",),)),
    "lfm2": ToolFormat(_lfm2, (("<|tool_call_start|>",),), ("<|tool_call_start|>", "<|tool_call_end|>")),
    "glm": _tagged(tagged_calls.GLM, (("<arg_key>",),)),
    "qwen-xml": _tagged(tagged_calls.QWEN, (("<function=", "<parameter="),)),
    "function-tag": ToolFormat(lambda _: FunctionTagCalls().steps, (("<function=", "</function>"),)),
    "hermes": _objects(("\n<tool_call>", "<tool_call>"), ("</tool_call>",), (("<tool_call>",),), _HERMES_TAGS),
    "granite": _objects(
        ("<|tool_call|>", "<tool_call>", "<function_call>"),
        ("</tool_call>",),
        (("<|tool_call|>", "<|start_of_role|>"),),
    ),
    "phi4-mini": _objects(
        ("<|tool_call|>", "functools["), ("<|/tool_call|>",), (("<|tool_call|>",), ("functools",), ("<|tool|>",))
    ),
    "pythonic": ToolFormat(
        _pythonic, (("<|python_start|>",), ("[func_name1(",)), ("<|python_start|>", "<|python_end|>")
    ),
    "llama3-json": ToolFormat(_llama_json, (("<|python_tag|>",), ('"parameters": ', "ipython")), ("<|python_tag|>",)),
}
"""By name, special formats before general ones: a template has the first format whose hints match."""

_UNPARSED = ("]<]minimax[>[",)
"""Markup of formats that are not parsed, and whose templates have the hints of others, too."""

_INTERRUPTS = ("<|tool_calls_section_begin|>", "<｜tool▁calls▁begin｜>")

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    HARMONY: ReasoningFormat(
        ThoughtTags("<|channel|>analysis<|message|>", "<|end|>"), (("<|channel|>", "<|message|>"),)
    ),
    "mistral": ReasoningFormat(ThoughtTags("[THINK]", "[/THINK]", trimmed=""), (("[THINK]",),)),
    "gemma": ReasoningFormat(ThoughtTags("<|channel>thought\n", "<channel|>"), (("<|channel>",),)),
    "seed": ReasoningFormat(ThoughtTags("<seed:think>", "</seed:think>"), (("<seed:think>",),)),
    "cohere": ReasoningFormat(
        ThoughtTags("<|START_THINKING|>", "<|END_THINKING|>"), (("<|START_THINKING|>", "<|END_THINKING|>"),)
    ),
    "granite": ReasoningFormat(
        ThoughtTags("Here is my thought process:", "Here is my response:"), (("Here is my thought process:",),)
    ),
    "kimi-vl": ReasoningFormat(ThoughtTags("◁think▷", "◁/think▷"), (("◁think▷",),)),
    "think": ReasoningFormat(ThoughtTags(interrupts=_INTERRUPTS), (("<think>",), ("</think>",))),
    "think-first": ReasoningFormat(ThoughtTags(interrupts=_INTERRUPTS, begins_inside=True)),
}
"""By name. "think-first" is for models that never write the opening tag. It is not detected, only chosen by option."""

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A model's formats of tool calls and reasoning, by name. None: such markup is not parsed.

    >>> parser = OutputFormat("hermes", "think").parser(tools=[], in_reasoning=True)
    >>> parser.feed("So.</think>Hello")
    [ReasoningText(text='So.'), ContentText(text='Hello')]
    """

    tools: str | None = None
    reasoning: str | None = None

    def __str__(self) -> str:
        """The formats as a server prints them at its start: ``tool calls: hermes, reasoning: none``."""
        return f"tool calls: {self.tools or NONE}, reasoning: {self.reasoning or NONE}"

    @property
    def special_tokens(self) -> frozenset[str]:
        """Markup that the parser reads. If a text is a special token, the detokenizer must keep it."""
        if HARMONY in (self.tools, self.reasoning):
            return frozenset(harmony.SPECIAL_TOKENS)
        tags = REASONING_FORMATS[self.reasoning].tags.texts if self.reasoning else ()
        calls = TOOL_FORMATS[self.tools].special if self.tools else ()
        return frozenset((*calls, *tags))

    @property
    def reads_special_tokens(self) -> bool:
        return bool(self.special_tokens)

    def parser(self, *, tools: Sequence[ToolSchema], in_reasoning: bool) -> OutputParser:
        """A parser of one answer.

        tools: the request's; if empty, the markup of calls is content. in_reasoning: whether the prompt ends within
        reasoning (`ends_in_reasoning`).
        """
        if HARMONY in (self.tools, self.reasoning):
            messages = HarmonyMessages(has_tools=bool(self.tools and tools), reasoning=self.reasoning is not None)
            return _AnswerParser(None, GeneratorParser(messages.steps))
        calls = TOOL_FORMATS[self.tools].steps(ParameterTypes(tools)) if self.tools and tools else None
        tags = REASONING_FORMATS[self.reasoning].tags if self.reasoning else None
        return _AnswerParser(
            None if tags is None else GeneratorParser(partial(tags.steps, in_reasoning=in_reasoning)),
            None if calls is None else GeneratorParser(calls),
        )

    def ends_in_reasoning(self, prompt: str, begun: str = "") -> bool:
        """Whether a rendered prompt ends within reasoning. begun: the end of the prompt that belongs to the answer."""
        if self.reasoning in (None, HARMONY):
            return False
        tags = REASONING_FORMATS[self.reasoning].tags
        opened = prompt[: len(prompt) - len(begun)].rstrip().endswith(tags.begin.rstrip())
        last_begin, last_end = begun.rfind(tags.begin), begun.rfind(tags.end)
        return last_end < 0 and opened if last_begin < 0 else last_begin > last_end


class _AnswerParser:
    """Parses reasoning first, then calls in the remaining content, and then trims white space."""

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
    """The formats of a chat template, by the markup in its text; each is None if it is not found."""
    text = chat_template or ""
    if any(markup in text for markup in _UNPARSED):
        return OutputFormat(None, None)
    tools = (name for name, each in TOOL_FORMATS.items() if _has(text, each.hints))
    reasoning = (name for name, each in REASONING_FORMATS.items() if _has(text, each.hints))
    return OutputFormat(next(tools, None), next(reasoning, None))


def _has(text: str, hints: tuple[tuple[str, ...], ...]) -> bool:
    return any(all(hint in text for hint in each) for each in hints)


def output_format(tools: str | None, reasoning: str | None) -> OutputFormat:
    """The formats of these names. None or "none": such markup is content.

    Raises ConfigError for an unknown name.
    """
    return OutputFormat(
        _known(tools, TOOL_FORMATS, "--tool-parser"), _known(reasoning, REASONING_FORMATS, "--reasoning-parser")
    )


def chosen_format(chat_template: str | None, tools: str = AUTO, reasoning: str = AUTO) -> OutputFormat:
    """The formats of these names. "auto": the one that is detected in the chat template.

    Raises ConfigError for an unknown name.
    """
    detected = detect_format(chat_template)
    return output_format(
        detected.tools if tools == AUTO else tools, detected.reasoning if reasoning == AUTO else reasoning
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
    """Parse a whole answer."""
    parser = output_format.parser(tools=tools, in_reasoning=in_reasoning)
    builder = MessageBuilder()
    builder.add(parser.feed(text))
    builder.add(parser.finish())
    return builder.message()
