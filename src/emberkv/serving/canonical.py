"""Canonical prompts: rules that drop or move volatile lines and put tools in order.

A date, a version or a session's id near a prompt's beginning makes everything behind it new to the cache. Rules name
such lines by wildcard patterns, which match in linear time whatever the text is. An operator's rules come from a file;
`AGENT_RULES` are on by default, because what they drop is not written for the model.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from emberkv.errors import ConfigError
from emberkv.validation import Strict, describe
from emberkv.yaml_files import read_yaml

TOOL_ORDER = "tool-order"
TOOL_KEYS = "tool-keys"


@dataclass(frozen=True, slots=True)
class Wildcard:
    r"""A pattern for a whole line, its surrounding space aside: ``*`` is any run of characters, ``\*`` a star.

    pieces: the literal texts between the stars.
    """

    pieces: tuple[str, ...]

    @classmethod
    def parse(cls, pattern: str) -> "Wildcard":
        pieces = [""]
        characters = iter(pattern.strip())
        for character in characters:
            if character == "*":
                pieces.append("")
            else:
                pieces[-1] += next(characters, "\\") if character == "\\" else character
        return cls(tuple(pieces))

    def matches(self, line: str) -> bool:
        line = line.strip()
        first, *middle = self.pieces
        if not middle:
            return line == first
        last = middle.pop()
        if not line.startswith(first) or not line.endswith(last) or len(line) < len(first) + len(last):
            return False
        at, end = len(first), len(line) - len(last)
        for piece in middle:  # the leftmost place for each piece leaves the most room for the next: no backtracking
            found = line.find(piece, at, end)
            if found < 0:
                return False
            at = found + len(piece)
        return True


def _parse_pattern(value: object) -> object:
    if not isinstance(value, str) or not value.strip() or not value.strip().strip("*"):
        raise ValueError("it must be a line's text, in which * stands for any characters")
    if "\n" in value.strip():
        raise ValueError("it must be one line")
    return Wildcard.parse(value)


Pattern = Annotated[Wildcard, BeforeValidator(_parse_pattern)]


class LineRule(Strict):
    """What to do with lines that match.

    until: the rule takes all lines from a match up to, not including, the next one that matches this, or any rule;
    without such a one, to the text's end. where: in the system prompt, in the user's messages, or both. first_line: the
    rule takes nothing but the first line of a text.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    match: Pattern
    until: Pattern | None = None
    action: Literal["drop", "move"]
    where: Literal["system", "user", "both"] = "system"
    first_line: bool = False

    @model_validator(mode="after")
    def _first_line_is_one(self) -> Self:
        if self.first_line and self.until is not None:
            raise ValueError("first_line takes one line; leave until out")
        return self

    @model_validator(mode="after")
    def _moves_within_the_system_prompt(self) -> Self:
        if self.action == "move" and self.where != "system":
            raise ValueError("move puts lines at the end of the system prompt, so where must be 'system'")
        return self


class ToolRules(Strict):
    """sort: tools in the order of their names. sort_keys: the same for the keys of every object inside them."""

    sort: bool = False
    sort_keys: bool = False


class CanonicalRules(Strict):
    """The rules of one file; the first that a line matches takes it."""

    lines: list[LineRule] = Field(default_factory=list)
    tools: ToolRules = ToolRules()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        counts = Counter([TOOL_ORDER, TOOL_KEYS, *(rule.name for rule in self.lines)])
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"the name {twice[0]!r} is taken; every rule needs a name of its own")
        return self

    @property
    def names(self) -> list[str]:
        """What the rules are called where changes are counted."""
        sorting = [name for name, on in ((TOOL_ORDER, self.tools.sort), (TOOL_KEYS, self.tools.sort_keys)) if on]
        return [*(rule.name for rule in self.lines), *sorting]

    def of_system(self, texts: list[str]) -> "Rewritten":
        """The system prompt's texts; moved lines come to the end of the last one, rule by rule."""
        rules = [rule for rule in self.lines if rule.where != "user"]
        kept: list[str] = []
        taken: dict[str, list[str]] = {rule.name: [] for rule in rules}
        for text in texts:
            rest, lines = _split(rules, text)
            kept.append(rest)
            for name, some in lines.items():
                taken[name] += some
        moved = [line for rule in rules if rule.action == "move" for line in taken[rule.name]]
        if moved:
            kept[-1] = "\n".join([*([kept[-1]] if kept[-1] else []), *moved])
        return Rewritten(kept, _sizes(taken))

    def of_user(self, text: str) -> "Rewritten":
        """A user's text."""
        kept, taken = _split([rule for rule in self.lines if rule.where != "system"], text)
        return Rewritten([kept], _sizes(taken))

    def of_tools(self, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Tools in either API's form."""
        counts: Counter[str] = Counter()
        if self.tools.sort:
            ordered = sorted(tools, key=_tool_name)
            counts[TOOL_ORDER] = sum(one is not other for one, other in zip(tools, ordered, strict=True))
            tools = ordered
        if self.tools.sort_keys:
            counts[TOOL_KEYS] = sum(not _keys_sorted(tool) for tool in tools)
            tools = [_with_sorted_keys(tool) for tool in tools]
        return tools, +counts


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Texts, and how many lines each rule took."""

    texts: list[str]
    counts: Counter[str] = field(default_factory=Counter)


AGENT_RULES = CanonicalRules.model_validate(
    {
        "lines": [
            # Claude Code reports its version and a checksum of the first message to Anthropic's billing in the first
            # line of its system prompt. The service that it is written for removes it before the model reads it.
            {
                "name": "claude-code-billing",
                "match": "x-anthropic-billing-header: *",
                "action": "drop",
                "first_line": True,
            }
        ]
    }
)
"""Rules for lines of known agents of which it is certain that they mean nothing to the model."""


def rules_in_force(path: Path | None, *, for_agents: bool) -> CanonicalRules | None:
    """The rules in an operator's file, if any, and behind them `AGENT_RULES`; None without either.

    A rule of the file takes the place of an agent rule of the same name. Raises ConfigError as `load_rules` does.
    """
    own = load_rules(path) if path is not None else CanonicalRules()
    taken = {rule.name for rule in own.lines}
    agents = [rule for rule in AGENT_RULES.lines if rule.name not in taken] if for_agents else []
    rules = own.model_copy(update={"lines": [*own.lines, *agents]})
    return rules if rules.names else None


def load_rules(path: Path) -> CanonicalRules:
    """The rules in a YAML file. Raises ConfigError naming the file and each key at fault."""
    name = f"the file of canonical rules {path}"
    data = read_yaml(path, ConfigError, name=name)
    try:
        return CanonicalRules.model_validate({} if data is None else data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe(error)}") from error


def _split(rules: list[LineRule], text: str) -> tuple[str, dict[str, list[str]]]:
    """``text`` without the lines that rules take, and those by rule.

    A line is the first rule's that it matches, which ends another's section: so what was moved is found again as it is.
    """
    if not _may_take(rules, text):
        return text, {}
    kept: list[str] = []
    taken: dict[str, list[str]] = {}
    section: LineRule | None = None
    for index, line in enumerate(text.split("\n")):
        begun = next((rule for rule in rules if rule.match.matches(line) and not (index and rule.first_line)), None)
        if begun is not None or (section is not None and section.until is not None and section.until.matches(line)):
            section = begun
        if section is None:
            kept.append(line)
        else:
            taken.setdefault(section.name, []).append(line)
        if section is not None and section.until is None:
            section = None
    return ("\n".join(kept) if taken else text), taken


def _may_take(rules: list[LineRule], text: str) -> bool:
    """False where it is plain, without splitting the text, that no line is taken."""
    if not all(rule.first_line for rule in rules):
        return True
    return any(rule.match.matches(text.partition("\n")[0]) for rule in rules)


def _sizes(taken: Mapping[str, list[str]]) -> Counter[str]:
    return Counter({name: len(lines) for name, lines in taken.items() if lines})


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _with_sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_sorted_keys(value[key]) for key in sorted(value)}
    return [_with_sorted_keys(each) for each in value] if isinstance(value, list) else value


def _keys_sorted(value: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == sorted(value) and all(map(_keys_sorted, value.values()))
    return all(map(_keys_sorted, value)) if isinstance(value, list) else True
