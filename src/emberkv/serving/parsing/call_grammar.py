"""Grammars that constrain an answer to its model's format of reasoning and tool calls.

Grammars are in llguidance's variant of Lark. The format's parser reads each allowed text as calls whose arguments are
valid by the tool's schema, as far as llguidance implements the schema's keywords.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llguidance import regex_to_lark

from emberkv.engine.constraints import GUIDANCE_OPTIONS, check_constraint
from emberkv.engine.request import Constraint
from emberkv.errors import RequestError
from emberkv.serving.parsing.formats import HARMONY, REASONING_FORMATS, OutputFormat, ToolSchema
from emberkv.serving.parsing.harmony import SPECIAL_TOKENS
from emberkv.serving.parsing.schema_values import ParameterTypes
from emberkv.validation import shown

_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
"""JSON on one line, as chat templates render it, so that a call has the same tokens in the next prompt."""

_PYTHON_OPTIONS = {**_JSON_OPTIONS, "json_allowed_escapes": 'nrt"\\'}
"""JSON with only those escapes that Python strings have, too."""

_OPEN_BY = frozenset({"additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref"})
_ANY_TEXT = "/(?s:.*)/"
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
    grammar = _Grammar()
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
    grammar = _Grammar()
    head = _thoughts(grammar, output_format, in_reasoning)
    if output_format.reasoning == HARMONY:
        head += f" {_quoted('<|channel|>final')} {_quoted(' <|constrain|>json')}? {_quoted('<|message|>')}"
    grammar.add("start", f"{head} answer")
    grammar.add("answer", _rule_of(constraint))
    markers = tuple(sorted({*constraint.markers, *output_format.special_tokens}))
    return check_constraint(Constraint("lark", grammar.text, markers))


def either(one: Constraint, other: Constraint) -> Constraint:
    """A constraint that allows the answers of both. Raises RequestError if they cannot be compiled together."""
    grammar = _Grammar()
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
                schema = Constraint("json_schema", json.dumps(_parameters(tool)), lenient=True)
                check_constraint(schema, f"tools[{index}].function.parameters")
        raise


def _parameters(tool: ToolSchema) -> dict[str, Any]:
    """The schema of a call's arguments. If it lists properties, it gets ``additionalProperties: false`` unless it has a
    keyword of `_OPEN_BY`, so that a call has no unknown arguments.
    """
    given = tool["function"].get("parameters")
    schema = dict(given) if isinstance(given, Mapping) else {}
    schema.setdefault("type", "object")
    if schema.get("properties") and not schema.keys() & _OPEN_BY:
        schema["additionalProperties"] = False
    return schema


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Grammar:
    """A grammar's rules by name."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}

    @property
    def text(self) -> str:
        return "\n".join(f"{name}: {rule}" for name, rule in self._rules.items())

    def __len__(self) -> int:
        return len(self._rules)

    def add(self, name: str, rule: str) -> str:
        """Add a rule. Returns its name without options, by which other rules refer to it."""
        self._rules[name] = rule
        return name.partition("[")[0]

    def new(self, rule: str, options: str = "") -> str:
        """Add a rule with a generated name, which is returned."""
        return self.add(f"r{len(self._rules)}{options}", rule)

    def json(self, schema: Mapping[str, Any], options: Mapping[str, object] = _JSON_OPTIONS) -> str:
        """Add a rule for JSON that is valid by the schema. options: llguidance's."""
        return self.new(f"%json {json.dumps({**schema, GUIDANCE_OPTIONS: options})}")

    def up_to(self, end: str, before: str = _ANY_TEXT) -> str:
        """Add a rule for text up to the first ``end``, which is included."""
        return self.new(before, f"[suffix={_quoted(end)}]")


def _thoughts(grammar: _Grammar, output_format: OutputFormat, in_reasoning: bool) -> str:
    """The rule of an answer's reasoning and the line breaks after it; empty for a format without reasoning."""
    if output_format.reasoning is None:
        return ""
    if output_format.reasoning == HARMONY:
        opening = f"{_quoted('<|channel|>analysis<|message|>')} {grammar.up_to('<|end|>', _harmony_text(grammar))}"
        return grammar.new(f"({opening} {_quoted('<|start|>assistant')})*")
    tags = REASONING_FORMATS[output_format.reasoning].tags
    interrupts = [text for text in tags.interrupts if text in output_format.special_tokens]
    rest = grammar.up_to(tags.end, _without(grammar, interrupts) if interrupts else _ANY_TEXT)
    if tags.trimmed:
        rest += f" /[{regex_to_lark(re.escape(tags.trimmed))}]{{0,4}}/"
    return grammar.new(rest if in_reasoning or tags.begins_inside else f"({_quoted(tags.begin)} {rest})?")


def _without(grammar: _Grammar, texts: Sequence[str]) -> str:
    """A rule for text without any of ``texts``."""
    return grammar.add("PLAIN", f"{_ANY_TEXT} & ~{_containing(texts)}")


def _containing(texts: Sequence[str]) -> str:
    """A regular expression for text with any of ``texts``."""
    return f"/(?s:.*)({'|'.join(regex_to_lark(re.escape(text)) for text in texts)})(?s:.*)/"


def _harmony_text(grammar: _Grammar) -> str:
    return _without(grammar, SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of calls: ``begin call (between call)* end``, where a call is ``call_begin BODY call_end``.

    body: returns the rule of a call's name and arguments.
    """

    body: Callable[[_Grammar, ToolSchema], str]
    begin: str = ""
    call_begin: str = ""
    call_end: str = ""
    between: str = ""
    end: str = ""


class _Calls:
    """Builds the rule of an answer from the layouts of its format."""

    def __init__(
        self,
        grammar: _Grammar,
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
            return f"({_quoted(marker)}{self._prose(marker)}) {self._any_of(layouts, marker)}"
        free = self.grammar.new(_ANY_TEXT)
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
        body = self._names(_named(" <|constrain|>json<|message|>"))
        call = f"{_quoted('<|channel|>commentary to=functions.')} {body}"
        if self._is_required and not self._prose_first:
            return call
        text = _harmony_text(self.grammar)
        message = self.grammar.up_to("<|end|><|start|>assistant", text)
        preamble = f"{_quoted('<|channel|>commentary<|message|>')} {message}"
        if self._is_required:
            return f"({preamble})? {call}"
        return f"({preamble})? ({call} | {_quoted('<|channel|>final<|message|>')} {text})"

    def _any_of(self, layouts: Sequence[_Layout], marker: str) -> str:
        return f"({' | '.join(self._section(layout, marker) for layout in layouts)})"

    def _section(self, layout: _Layout, marker: str) -> str:
        body = self._names(layout.body)
        first = (layout.begin + layout.call_begin).removeprefix(marker)
        rule = _sequence(first, body, layout.call_end)
        if self._parallel:
            rule += f" ({_sequence(layout.between + layout.call_begin, body, layout.call_end)})*"
        return _sequence("", rule, layout.end)

    def _names(self, body: Callable[[_Grammar, ToolSchema], str]) -> str:
        return self.grammar.new(" | ".join(body(self.grammar, tool) for tool in self.tools))


def _sequence(before: str, rule: str, behind: str) -> str:
    """``rule`` between two literal texts, either of which may be empty."""
    return " ".join(([_quoted(before)] if before else []) + [rule] + ([_quoted(behind)] if behind else []))


def _name(tool: ToolSchema) -> str:
    name: str = tool["function"]["name"]
    return name


def _object(key: str) -> Callable[[_Grammar, ToolSchema], str]:
    """``{"name": "f", "arguments": {...}}``."""

    def body(grammar: _Grammar, tool: ToolSchema) -> str:
        head = f'{{"name": {json.dumps(_name(tool))}, "{key}": '
        return f'{_quoted(head)} {grammar.json(_parameters(tool))} "}}"'

    return body


def _named(middle: str, before: str = "", behind: str = "") -> Callable[[_Grammar, ToolSchema], str]:
    """The tool's name, the text ``middle``, and the arguments as JSON."""

    def body(grammar: _Grammar, tool: ToolSchema) -> str:
        return _sequence(before + _name(tool) + middle, grammar.json(_parameters(tool)), behind)

    return body


def _kimi(grammar: _Grammar, tool: ToolSchema) -> str:
    """Kimi's call, whose id is ``functions.NAME:INDEX``."""
    arguments = grammar.json(_parameters(tool))
    return f'{_quoted(f"functions.{_name(tool)}:")} /[0-9]{{1,3}}/ "<|tool_call_argument_begin|>" {arguments}'


def _cohere(grammar: _Grammar, tool: ToolSchema) -> str:
    """Cohere's call, which has a number within its turn."""
    middle = f'", "tool_name": {json.dumps(_name(tool))}, "parameters": '
    return f'"{{\\"tool_call_id\\": \\"" /[0-9]{{1,2}}/ {_quoted(middle)} {grammar.json(_parameters(tool))} "}}"'


def _python(grammar: _Grammar, tool: ToolSchema) -> str:
    """``f(a=1, b="x")``. Values are JSON, which equals Python except for true, false and null."""
    schema = _parameters(tool)
    items = [
        (_quoted(f"{key}=") + " " + _python_value(grammar, part), key in schema.get("required", ()))
        for key, part in _properties(schema)
    ]
    return f'{_quoted(_name(tool) + "(")} {_separated(grammar, items, ", ")} ")"'


def _python_value(grammar: _Grammar, schema: Mapping[str, Any]) -> str:
    is_plain_bool = schema.get("type") == "boolean" and not schema.keys() & {"enum", "const"}
    return '("True" | "False")' if is_plain_bool else grammar.json(schema, _PYTHON_OPTIONS)


def _separated(grammar: _Grammar, items: Sequence[tuple[str, bool]], separator: str) -> str:
    """The items in order, with the separator between them. Items with the flag False are optional."""
    first = behind = '""'  # the rule of the remaining items: at the beginning, and after another item
    for item, is_required in reversed(items):
        later = behind
        behind = grammar.new(f"{_quoted(separator)} {item} {later}" + ("" if is_required else f" | {later}"))
        first = grammar.new(f"{item} {later}" + ("" if is_required else f" | {first}"))
    return first


def _properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A tool's parameters, each with its schema, to which the definitions of the whole schema are added."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for key, part in (schema.get("properties") or {}).items():
        yield key, {**shared, **(part if isinstance(part, dict) else {})}


@dataclass(frozen=True, slots=True)
class _Tags:
    """Parameters in tags, ``key NAME key_end VALUE value_end``. Strings are plain text, other values JSON."""

    head: str
    head_end: str
    key: str
    key_end: str
    value_end: str
    tail: str = ""

    def __call__(self, grammar: _Grammar, tool: ToolSchema) -> str:
        schema, types = _parameters(tool), ParameterTypes([tool])
        required = schema.get("required", ())
        rule = [_quoted(f"{self.head}{_name(tool)}{self.head_end}")]
        for key, part in _properties(schema):
            is_text = types.of(_name(tool), key) == {"string"}
            opening = self.key + key + self.key_end.format(string="true" if is_text else "false")
            value = f"{_quoted(opening)} {self._value(grammar, part, types.of(_name(tool), key))}"
            rule.append(value if key in required else f"({value})?")
        return " ".join([*rule, *([_quoted(self.tail)] if self.tail else [])])

    def _value(self, grammar: _Grammar, schema: Mapping[str, Any], types: frozenset[str]) -> str:
        end = _quoted(self.value_end)
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if choices:
            texts = (each if isinstance(each, str) else json.dumps(each) for each in choices)
            return f"({' | '.join(map(_quoted, texts))}) {end}"
        if types == {"string"}:
            return self._string(grammar, schema)
        if not types or "string" in types:
            return grammar.up_to(self.value_end)
        return f"{grammar.json(schema)} {end}"

    def _string(self, grammar: _Grammar, schema: Mapping[str, Any]) -> str:
        if isinstance(schema.get("pattern"), str):
            # Without the end tag: a value that does not match yet would go on behind it.
            value = f"/{_searched(schema['pattern'])}/ & ~{_containing([self.value_end])}"
            return grammar.up_to(self.value_end, grammar.add(f"VALUE{len(grammar)}", value))
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return grammar.up_to(self.value_end, f"/(?s:.{{{least},{most}}})/" if least or most != "" else _ANY_TEXT)


_PATTERN_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""An escape, a class of characters, or one other character of a regular expression."""


def _searched(pattern: str) -> str:
    """A regular expression for texts that contain a match of ``pattern``, which JSON Schema does not anchor."""
    return regex_to_lark("|".join(map(_anywhere, _alternatives(pattern))), "dw")


def _alternatives(pattern: str) -> list[str]:
    """The parts of a pattern between the bars that are in no group; an anchor belongs to its part alone."""
    parts, depth = [""], 0
    for piece in _PATTERN_PIECE.findall(pattern):
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _anywhere(pattern: str) -> str:
    before = "" if pattern.startswith("^") else "(?s:.*)"
    behind = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^") if not before else pattern
    return f"{before}({inner[:-1] if not behind else inner}){behind}"


_OBJECT = _object("arguments")
_IN_TOOL_CALL_TAGS = _Layout(_OBJECT, call_begin="<tool_call>\n", call_end="\n</tool_call>", between="\n")
_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_FENCED = _named("\n```json\n", "function<｜tool▁sep｜>", "\n```")
_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>")
_QWEN = _Tags("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>")
_GLM = _Tags("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
_MINIMAX = _Tags('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>\n")
_DSML = _Tags(
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
        _Layout(_named("<｜tool▁sep｜>"), *_DEEPSEEK_SECTION, end="<｜tool▁calls▁end｜>"),
        _Layout(_DEEPSEEK_FENCED, *_DEEPSEEK_SECTION, between="\n", end="<｜tool▁calls▁end｜>"),
    ),
    "kimi": lambda calls: calls.behind_marker(
        "<|tool_calls_section_begin|>", _Layout(_kimi, *_KIMI_SECTION, end="<|tool_calls_section_end|>")
    ),
    "mistral": lambda calls: calls.behind_marker(
        "[TOOL_CALLS]",
        _Layout(_named("[ARGS]"), call_begin="[TOOL_CALLS]"),
        _Layout(_OBJECT, "[TOOL_CALLS][", between=", ", end="]"),
    ),
    "granite": lambda calls: calls.behind_marker(
        "<|tool_call|>", _Layout(_OBJECT, "<|tool_call|>[", between=", ", end="]")
    ),
    "phi4-mini": lambda calls: calls.behind_marker(
        "<|tool_call|>", _Layout(_OBJECT, "<|tool_call|>[", between=", ", end="]<|/tool_call|>")
    ),
    "cohere": lambda calls: calls.behind_marker(
        "<|START_ACTION|>", _Layout(_cohere, "<|START_ACTION|>[\n    ", between=",\n    ", end="\n]<|END_ACTION|>")
    ),
    "nemotron": lambda calls: calls.behind_marker(
        "<TOOLCALL>", _Layout(_OBJECT, "<TOOLCALL>[", between=", ", end="]</TOOLCALL>")
    ),
    "lfm2": lambda calls: calls.behind_marker(
        "<|tool_call_start|>", _Layout(_python, "<|tool_call_start|>[", between=", ", end="]<|tool_call_end|>")
    ),
    "function-tag": lambda calls: calls.behind_marker(
        "<function=", _Layout(_named(">"), call_begin="<function=", call_end="</function>", between="\n")
    ),
    "gemma": lambda calls: calls.behind_marker(
        "<|tool_call>", _Layout(_named(""), call_begin="<|tool_call>call:", call_end="<tool_call|>")
    ),
    "functiongemma": lambda calls: calls.behind_marker(
        "<start_function_call>",
        _Layout(_named(""), call_begin="<start_function_call>call:", call_end="<end_function_call>"),
    ),
    "gemma-python": lambda calls: calls.behind_marker(
        "```tool_code\n", _Layout(_python, "```tool_code\n", between="\n", end="\n```")
    ),
    "pythonic": lambda calls: calls.at_start("[", _Layout(_python, "[", between=", ", end="]")),
    "llama3-json": lambda calls: calls.at_start("{", _Layout(_object("parameters"), between="; ")),
    HARMONY: lambda calls: calls.harmony(),
}
"""For each format, by its name, the rule of an answer with calls."""
