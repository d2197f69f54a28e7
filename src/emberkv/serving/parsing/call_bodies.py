"""How each format writes a call's name and arguments, as rules of a grammar in llguidance's variant of Lark."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from emberkv.engine.constraints import GUIDANCE_OPTIONS
from emberkv.serving.parsing.formats import ToolSchema
from emberkv.serving.parsing.schema_values import ParameterTypes

_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
"""JSON on one line, as chat templates render it, so that a call has the same tokens in the next prompt."""

_PYTHON_OPTIONS = {**_JSON_OPTIONS, "json_allowed_escapes": 'nrt"\\'}
"""JSON with only those escapes that Python strings have, too."""

_OPEN_BY = frozenset({"additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref"})
ANY_TEXT = "/(?s:.*)/"

Body = Callable[["Grammar", ToolSchema], str]
"""Adds the rules of a call to a tool, and returns the rule of its name and arguments."""


def parameters_schema(tool: ToolSchema) -> dict[str, Any]:
    """The schema of a call's arguments. If it lists properties, it gets ``additionalProperties: false`` unless it has a
    keyword of `_OPEN_BY`, so that a call has no unknown arguments.
    """
    given = tool["function"].get("parameters")
    schema = dict(given) if isinstance(given, Mapping) else {}
    schema.setdefault("type", "object")
    if schema.get("properties") and not schema.keys() & _OPEN_BY:
        schema["additionalProperties"] = False
    return schema


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class Grammar:
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

    def up_to(self, end: str, before: str = ANY_TEXT) -> str:
        """Add a rule for text up to the first ``end``, which is included."""
        return self.new(before, f"[suffix={quoted(end)}]")


def containing(texts: Sequence[str]) -> str:
    """A regular expression for text with any of ``texts``."""
    return f"/(?s:.*)({'|'.join(regex_to_lark(re.escape(text)) for text in texts)})(?s:.*)/"


def sequence(before: str, rule: str, behind: str) -> str:
    """``rule`` between two literal texts, either of which may be empty."""
    return " ".join(([quoted(before)] if before else []) + [rule] + ([quoted(behind)] if behind else []))


def _name(tool: ToolSchema) -> str:
    name: str = tool["function"]["name"]
    return name


def object_body(key: str) -> Body:
    """``{"name": "f", "arguments": {...}}``."""

    def body(grammar: Grammar, tool: ToolSchema) -> str:
        head = f'{{"name": {json.dumps(_name(tool))}, "{key}": '
        return f'{quoted(head)} {grammar.json(parameters_schema(tool))} "}}"'

    return body


def named_body(middle: str, before: str = "", behind: str = "") -> Body:
    """The tool's name, the text ``middle``, and the arguments as JSON."""

    def body(grammar: Grammar, tool: ToolSchema) -> str:
        return sequence(before + _name(tool) + middle, grammar.json(parameters_schema(tool)), behind)

    return body


def kimi_body(grammar: Grammar, tool: ToolSchema) -> str:
    """Kimi's call, whose id is ``functions.NAME:INDEX``."""
    arguments = grammar.json(parameters_schema(tool))
    return f'{quoted(f"functions.{_name(tool)}:")} /[0-9]{{1,3}}/ "<|tool_call_argument_begin|>" {arguments}'


def cohere_body(grammar: Grammar, tool: ToolSchema) -> str:
    """Cohere's call, which has a number within its turn."""
    middle = f'", "tool_name": {json.dumps(_name(tool))}, "parameters": '
    return f'"{{\\"tool_call_id\\": \\"" /[0-9]{{1,2}}/ {quoted(middle)} {grammar.json(parameters_schema(tool))} "}}"'


def python_body(grammar: Grammar, tool: ToolSchema) -> str:
    """``f(a=1, b="x")``. Values are JSON, which equals Python except for true, false and null."""
    schema = parameters_schema(tool)
    items = [
        (quoted(f"{key}=") + " " + _python_value(grammar, part), key in schema.get("required", ()))
        for key, part in _properties(schema)
    ]
    return f'{quoted(_name(tool) + "(")} {_separated(grammar, items, ", ")} ")"'


def _python_value(grammar: Grammar, schema: Mapping[str, Any]) -> str:
    is_plain_bool = schema.get("type") == "boolean" and not schema.keys() & {"enum", "const"}
    return '("True" | "False")' if is_plain_bool else grammar.json(schema, _PYTHON_OPTIONS)


def _separated(grammar: Grammar, items: Sequence[tuple[str, bool]], separator: str) -> str:
    """The items in order, with the separator between them. Items with the flag False are optional."""
    first = behind = '""'  # the rule of the remaining items: at the beginning, and after another item
    for item, is_required in reversed(items):
        later = behind
        behind = grammar.new(f"{quoted(separator)} {item} {later}" + ("" if is_required else f" | {later}"))
        first = grammar.new(f"{item} {later}" + ("" if is_required else f" | {first}"))
    return first


def _properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A tool's parameters, each with its schema, to which the definitions of the whole schema are added."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for key, part in (schema.get("properties") or {}).items():
        yield key, {**shared, **(part if isinstance(part, dict) else {})}


@dataclass(frozen=True, slots=True)
class TagBody:
    """Parameters in tags, ``key NAME key_end VALUE value_end``. Strings are plain text, other values JSON."""

    head: str
    head_end: str
    key: str
    key_end: str
    value_end: str
    tail: str = ""

    def __call__(self, grammar: Grammar, tool: ToolSchema) -> str:
        schema, types = parameters_schema(tool), ParameterTypes([tool])
        required = schema.get("required", ())
        rule = [quoted(f"{self.head}{_name(tool)}{self.head_end}")]
        for key, part in _properties(schema):
            is_text = types.of(_name(tool), key) == {"string"}
            opening = self.key + key + self.key_end.format(string="true" if is_text else "false")
            value = f"{quoted(opening)} {self._value(grammar, part, types.of(_name(tool), key))}"
            rule.append(value if key in required else f"({value})?")
        return " ".join([*rule, *([quoted(self.tail)] if self.tail else [])])

    def _value(self, grammar: Grammar, schema: Mapping[str, Any], types: frozenset[str]) -> str:
        end = quoted(self.value_end)
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if choices:
            texts = (each if isinstance(each, str) else json.dumps(each) for each in choices)
            return f"({' | '.join(map(quoted, texts))}) {end}"
        if types == {"string"}:
            return self._string(grammar, schema)
        if not types or "string" in types:
            return grammar.up_to(self.value_end)
        return f"{grammar.json(schema)} {end}"

    def _string(self, grammar: Grammar, schema: Mapping[str, Any]) -> str:
        if isinstance(schema.get("pattern"), str):
            # Without the end tag: a value that does not match yet would go on behind it.
            value = f"/{_searched(schema['pattern'])}/ & ~{containing([self.value_end])}"
            return grammar.up_to(self.value_end, grammar.add(f"VALUE{len(grammar)}", value))
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return grammar.up_to(self.value_end, f"/(?s:.{{{least},{most}}})/" if least or most != "" else ANY_TEXT)


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
