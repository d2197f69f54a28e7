"""Grammars that constrain an answer to its model's format of reasoning and tool calls.

Grammars are in llguidance's variant of Lark. The format's parser reads each allowed text as calls whose arguments are
valid by the tool's schema, as far as llguidance implements the schema's keywords.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llguidance import regex_to_lark

from emberkv.engine.constraints import GUIDANCE_OPTIONS, check_constraint
from emberkv.engine.request import Constraint
from emberkv.errors import RequestError
from emberkv.serving.parsing.call_bodies import (
    ANY_TEXT,
    Body,
    Grammar,
    TagBody,
    cohere_body,
    containing,
    kimi_body,
    named_body,
    object_body,
    parameters_schema,
    python_body,
    quoted,
    sequence,
)
from emberkv.serving.parsing.formats import HARMONY, REASONING_FORMATS, OutputFormat, ToolSchema
from emberkv.serving.parsing.harmony import SPECIAL_TOKENS
from emberkv.validation import shown

_ANY_OBJECT = {"type": "object"}


class Choice(Protocol):
    """Which tools an answer may call; implemented by `emberkv.serving.api.conversation.ToolChoice`."""

    @property
    def mode(self) -> Literal["auto", "none", "required"]: ...

    @property
    def names(self) -> Sequence[str]:
        """The only tools that may be called; empty: all."""
        ...

    @property
    def parallel(self) -> bool: ...


def call_constraint(
    output_format: OutputFormat,
    tools: Sequence[ToolSchema],
    choice: Choice,
    *,
    in_reasoning: bool = False,
    prose_first: bool = False,
) -> Constraint | None:
    """The checked constraint of an answer with these tools; None for an answer without constraint.

    With "required", the answer is reasoning followed by calls. With "auto", an answer is constrained only if a tool has
    ``strict``, only some tools may be called, or only one call may be made; text is free up to the marker that begins a
    call. in_reasoning: whether the prompt ends within reasoning (`OutputFormat.ends_in_reasoning`).

    prose_first: whether text that does not begin like JSON may precede required calls.

    Raises RequestError for a name that is not among the tools, for a model without a known tool call format, and for a
    tool's schema that cannot be compiled.
    """
    wanted = _wanted(tools, choice)
    is_strict = any(tool["function"].get("strict") for tool in wanted)
    if (
        choice.mode == "none"
        or not wanted
        or (choice.mode == "auto" and not (is_strict or choice.names or not choice.parallel))
    ):
        return None
    make = _FORMATS.get(output_format.tools or "")
    if make is None:
        if choice.mode == "auto":
            return None
        raise RequestError(
            "this model's chat template has no known format of tool calls; name one with --tool-parser",
            param="tool_choice",
        )
    _check_shapes(tools)
    grammar = Grammar()
    calls = _Calls(
        grammar, wanted, is_required=choice.mode == "required", parallel=choice.parallel, prose_first=prose_first
    )
    answer = make(calls)
    grammar.add("start", f"{_thoughts(grammar, output_format, in_reasoning)} {answer}")
    markers = tuple(sorted(output_format.special_tokens))
    return _checked(Constraint("lark", grammar.text, markers), wanted, tools)


def behind_reasoning(constraint: Constraint, output_format: OutputFormat, *, in_reasoning: bool = False) -> Constraint:
    """The constraint, applied to the text after reasoning. A format without reasoning leaves it unchanged."""
    if output_format.reasoning is None:
        return constraint
    grammar = Grammar()
    head = _thoughts(grammar, output_format, in_reasoning)
    if output_format.reasoning == HARMONY:
        head += f" {quoted('<|channel|>final')} {quoted(' <|constrain|>json')}? {quoted('<|message|>')}"
    grammar.add("start", f"{head} answer")
    grammar.add("answer", _rule_of(constraint))
    markers = tuple(sorted({*constraint.markers, *output_format.special_tokens}))
    return check_constraint(Constraint("lark", grammar.text, markers))


def either(one: Constraint, other: Constraint) -> Constraint:
    """A constraint that allows the answers of both. Raises RequestError if they cannot be compiled together."""
    grammar = Grammar()
    grammar.add("start", "one | other")
    grammar.add("one", _rule_of(one))
    grammar.add("other", _rule_of(other))
    return check_constraint(Constraint("lark", grammar.text, tuple(sorted({*one.markers, *other.markers}))))


def _rule_of(constraint: Constraint) -> str:
    """The constraint as a rule of a grammar."""
    match constraint.kind:
        case "json_object":
            return f"%json {json.dumps(_ANY_OBJECT)}"
        case "json_schema":
            schema = json.loads(constraint.text)
            if isinstance(schema, bool):  # check_constraint has refused false, which allows nothing
                schema = {}
            return f"%json {json.dumps({**schema, GUIDANCE_OPTIONS: {'lenient': constraint.lenient}})}"
        case "regex":
            return f"/{regex_to_lark(constraint.text)}/"
        case "lark":
            return f"%lark {{\n{constraint.text}\n}}"


def _wanted(tools: Sequence[ToolSchema], choice: Choice) -> list[ToolSchema]:
    """The tools that may be called. Raises RequestError for the name of an unknown tool."""
    known = {tool["function"]["name"]: tool for tool in tools}
    unknown = next((name for name in choice.names if name not in known), None)
    if unknown is not None:
        raise RequestError(f"tool_choice names {unknown!r}, which is not among the tools", param="tool_choice")
    return [known[name] for name in (choice.names or known)]


def _check_shapes(tools: Sequence[ToolSchema]) -> None:
    """Raises RequestError for a tool's schema with a value of the wrong type for a keyword that is read here."""
    for index, tool in enumerate(tools):
        param = f"tools[{index}].function.parameters"
        given = tool["function"].get("parameters")
        parameters = given if isinstance(given, Mapping) else {}
        properties = parameters.get("properties", {})
        if not isinstance(properties, Mapping):
            raise RequestError(f"{param}.properties is {shown(properties)}; it must be an object", param=param)
        lists = [(parameters, "required"), *((part, "enum") for part in properties.values())]
        for schema, keyword in lists:
            if isinstance(schema, Mapping) and not isinstance(schema.get(keyword, []), list):
                raise RequestError(f"{param} has {keyword} as {shown(schema[keyword])}; it must be a list", param=param)


def _checked(constraint: Constraint, wanted: Sequence[ToolSchema], tools: Sequence[ToolSchema]) -> Constraint:
    """The constraint, checked. Raises RequestError naming the tool whose schema cannot be compiled."""
    try:
        return check_constraint(constraint, "tools")
    except RequestError:
        for index, tool in enumerate(tools):
            if tool in wanted:
                schema = Constraint("json_schema", json.dumps(parameters_schema(tool)), lenient=True)
                check_constraint(schema, f"tools[{index}].function.parameters")
        raise


def _thoughts(grammar: Grammar, output_format: OutputFormat, in_reasoning: bool) -> str:
    """The rule of an answer's reasoning and the line breaks after it; empty for a format without reasoning."""
    if output_format.reasoning is None:
        return ""
    if output_format.reasoning == HARMONY:
        opening = f"{quoted('<|channel|>analysis<|message|>')} {grammar.up_to('<|end|>', _harmony_text(grammar))}"
        return grammar.new(f"({opening} {quoted('<|start|>assistant')})*")
    tags = REASONING_FORMATS[output_format.reasoning].tags
    interrupts = [text for text in tags.interrupts if text in output_format.special_tokens]
    rest = grammar.up_to(tags.end, _without(grammar, interrupts) if interrupts else ANY_TEXT)
    if tags.trimmed:
        rest += f" /[{regex_to_lark(re.escape(tags.trimmed))}]{{0,4}}/"
    return grammar.new(rest if in_reasoning or tags.begins_inside else f"({quoted(tags.begin)} {rest})?")


def _without(grammar: Grammar, texts: Sequence[str]) -> str:
    """A rule for text without any of ``texts``."""
    return grammar.add("PLAIN", f"{ANY_TEXT} & ~{containing(texts)}")


def _harmony_text(grammar: Grammar) -> str:
    return _without(grammar, SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of calls: ``begin call (between call)* end``, where a call is ``call_begin BODY call_end``.

    body: returns the rule of a call's name and arguments.
    """

    body: Body
    begin: str = ""
    call_begin: str = ""
    call_end: str = ""
    between: str = ""
    end: str = ""


class _Calls:
    """Builds the rule of an answer from the layouts of its format."""

    def __init__(
        self,
        grammar: Grammar,
        tools: Sequence[ToolSchema],
        *,
        is_required: bool,
        parallel: bool,
        prose_first: bool = False,
    ) -> None:
        self.grammar = grammar
        self.tools = tools
        self._is_required = is_required
        self._parallel = parallel
        self._prose_first = prose_first

    def behind_marker(self, marker: str, *layouts: _Layout) -> str:
        """The rule for a format in which calls begin with ``marker``."""
        if self._is_required:
            return f"({quoted(marker)}{self._prose(marker)}) {self._any_of(layouts, marker)}"
        free = self.grammar.new(ANY_TEXT)
        head = self.grammar.up_to(marker)
        calls = f"{head} {self._any_of(layouts, marker)}"
        return f"({calls})* {free}" if self._parallel else f"({free} | {calls})"

    def _prose(self, marker: str) -> str:
        """The alternative to a marker alone: text that begins neither like a JSON value nor like it, and the marker."""
        if not self._prose_first:
            return ""
        first = regex_to_lark(re.escape(marker[0]))
        return " | " + self.grammar.up_to(marker, f'/[^-\\s{{\\["0-9{first}](?s:.*)/')

    def at_start(self, first: str, *layouts: _Layout) -> str:
        """The rule for a format in which calls are the whole answer and begin with the character ``first``."""
        calls = self._any_of(layouts, "")
        return calls if self._is_required else f"({calls} | /([^\\s\\{first}](?s:.*))?/)"

    def harmony(self) -> str:
        """The rule for Harmony: one message to a function or, with "auto", to the user."""
        body = self._names(named_body(" <|constrain|>json<|message|>"))
        call = f"{quoted('<|channel|>commentary to=functions.')} {body}"
        if self._is_required and not self._prose_first:
            return call
        text = _harmony_text(self.grammar)
        message = self.grammar.up_to("<|end|><|start|>assistant", text)
        preamble = f"{quoted('<|channel|>commentary<|message|>')} {message}"
        if self._is_required:
            return f"({preamble})? {call}"
        return f"({preamble})? ({call} | {quoted('<|channel|>final<|message|>')} {text})"

    def _any_of(self, layouts: Sequence[_Layout], marker: str) -> str:
        return f"({' | '.join(self._section(layout, marker) for layout in layouts)})"

    def _section(self, layout: _Layout, marker: str) -> str:
        body = self._names(layout.body)
        first = (layout.begin + layout.call_begin).removeprefix(marker)
        rule = sequence(first, body, layout.call_end)
        if self._parallel:
            rule += f" ({sequence(layout.between + layout.call_begin, body, layout.call_end)})*"
        return sequence("", rule, layout.end)

    def _names(self, body: Body) -> str:
        return self.grammar.new(" | ".join(body(self.grammar, tool) for tool in self.tools))


_OBJECT = object_body("arguments")
_IN_TOOL_CALL_TAGS = _Layout(_OBJECT, call_begin="<tool_call>\n", call_end="\n</tool_call>", between="\n")
_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_FENCED = named_body("\n```json\n", "function<｜tool▁sep｜>", "\n```")
_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>")
_QWEN = TagBody("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>")
_GLM = TagBody("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
_MINIMAX = TagBody('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>\n")
_DSML = TagBody(
    '<｜DSML｜invoke name="', '">\n', '<｜DSML｜parameter name="', '" string="{string}">', "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>\n",
)  # fmt: skip

_FORMATS: Mapping[str, Callable[[_Calls], str]] = {
    "hermes": lambda calls: calls.behind_marker("<tool_call>", _IN_TOOL_CALL_TAGS),
    "qwen-xml": lambda calls: calls.behind_marker(
        "<tool_call>", _Layout(_QWEN, call_begin="<tool_call>\n", call_end="\n</tool_call>", between="\n")
    ),
    "glm": lambda calls: calls.behind_marker(
        "<tool_call>", _Layout(_GLM, call_begin="<tool_call>", call_end="</tool_call>", between="\n")
    ),
    "minimax-m2": lambda calls: calls.behind_marker(
        "<minimax:tool_call>", _Layout(_MINIMAX, "<minimax:tool_call>\n", end="</minimax:tool_call>")
    ),
    "minimax-m1": lambda calls: calls.behind_marker(
        "<tool_calls>", _Layout(_OBJECT, "<tool_calls>\n", between="\n", end="\n</tool_calls>")
    ),
    "deepseek-dsml": lambda calls: calls.behind_marker(
        "<｜DSML｜function_calls>", _Layout(_DSML, "<｜DSML｜function_calls>\n", end="</｜DSML｜function_calls>")
    ),
    "deepseek": lambda calls: calls.behind_marker(
        "<｜tool▁calls▁begin｜>",
        _Layout(named_body("<｜tool▁sep｜>"), *_DEEPSEEK_SECTION, end="<｜tool▁calls▁end｜>"),
        _Layout(_DEEPSEEK_FENCED, *_DEEPSEEK_SECTION, between="\n", end="<｜tool▁calls▁end｜>"),
    ),
    "kimi": lambda calls: calls.behind_marker(
        "<|tool_calls_section_begin|>", _Layout(kimi_body, *_KIMI_SECTION, end="<|tool_calls_section_end|>")
    ),
    "mistral": lambda calls: calls.behind_marker(
        "[TOOL_CALLS]",
        _Layout(named_body("[ARGS]"), call_begin="[TOOL_CALLS]"),
        _Layout(_OBJECT, "[TOOL_CALLS][", between=", ", end="]"),
    ),
    "granite": lambda calls: calls.behind_marker(
        "<|tool_call|>", _Layout(_OBJECT, "<|tool_call|>[", between=", ", end="]")
    ),
    "phi4-mini": lambda calls: calls.behind_marker(
        "<|tool_call|>", _Layout(_OBJECT, "<|tool_call|>[", between=", ", end="]<|/tool_call|>")
    ),
    "cohere": lambda calls: calls.behind_marker(
        "<|START_ACTION|>", _Layout(cohere_body, "<|START_ACTION|>[\n    ", between=",\n    ", end="\n]<|END_ACTION|>")
    ),
    "nemotron": lambda calls: calls.behind_marker(
        "<TOOLCALL>", _Layout(_OBJECT, "<TOOLCALL>[", between=", ", end="]</TOOLCALL>")
    ),
    "lfm2": lambda calls: calls.behind_marker(
        "<|tool_call_start|>", _Layout(python_body, "<|tool_call_start|>[", between=", ", end="]<|tool_call_end|>")
    ),
    "function-tag": lambda calls: calls.behind_marker(
        "<function=", _Layout(named_body(">"), call_begin="<function=", call_end="</function>", between="\n")
    ),
    "gemma": lambda calls: calls.behind_marker(
        "<|tool_call>", _Layout(named_body(""), call_begin="<|tool_call>call:", call_end="<tool_call|>")
    ),
    "functiongemma": lambda calls: calls.behind_marker(
        "<start_function_call>",
        _Layout(named_body(""), call_begin="<start_function_call>call:", call_end="<end_function_call>"),
    ),
    "gemma-python": lambda calls: calls.behind_marker(
        "```tool_code\n", _Layout(python_body, "```tool_code\n", between="\n", end="\n```")
    ),
    "pythonic": lambda calls: calls.at_start("[", _Layout(python_body, "[", between=", ", end="]")),
    "llama3-json": lambda calls: calls.at_start("{", _Layout(object_body("parameters"), between="; ")),
    HARMONY: lambda calls: calls.harmony(),
}
"""For each format, by its name, the rule of an answer with calls."""
