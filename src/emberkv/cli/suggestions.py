"""``emberkv explain --suggest``: the canonical rules that a server suggests, in a table and as a file for them."""

from collections.abc import Sequence

import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING_FOUND = "The server has found no volatile lines in its misses since it started."


class SuggestedRule(BaseModel):
    """A rule of a file of canonical rules."""

    name: str
    match: str
    action: str


class SuggestedLine(BaseModel):
    """See ``emberkv.serving.cache.volatile_lines``."""

    tenant: str
    rule: SuggestedRule
    requests: int
    tokens_a_day: int


class Suggestions(BaseModel):
    """The answer to ``GET /v1/cache/suggestions``."""

    data: list[SuggestedLine]


def print_suggestions(console: Console, found: Sequence[SuggestedLine]) -> None:
    """Print what each line costs, and the rules as the file that --canonical takes."""
    if not found:
        console.print(NOTHING_FOUND)
        return
    console.print("These lines of system prompts change, and what follows them is computed again:")
    console.print(_suggestion_table(found))
    console.print("\nA file for --canonical that moves them behind the rest:\n")
    console.print(rules_file(found), soft_wrap=True)  # a line that is wrapped would be another pattern


def _suggestion_table(found: Sequence[SuggestedLine]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens a day", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("line", overflow="fold")
    several = len({each.tenant for each in found}) > 1
    if several:
        table.add_column("tenant", overflow="fold")
    for each in found:
        tenant = [Text(each.tenant)] if several else []
        table.add_row(f"{each.tokens_a_day:,}", f"{each.requests:,}", Text(each.rule.match), *tenant)
    return table


def rules_file(found: Sequence[SuggestedLine]) -> str:
    """The rules as YAML, each match once, under names that differ."""
    rules: dict[str, SuggestedRule] = {}
    for each in found:
        rules.setdefault(each.rule.match, each.rule)
    names: dict[str, int] = {}
    lines = []
    for rule in rules.values():
        number = names[rule.name] = names.get(rule.name, 0) + 1
        name = rule.name if number == 1 else f"{rule.name[:36]}-{number}"
        lines.append({"name": name, "match": rule.match, "action": rule.action})
    return yaml.safe_dump({"lines": lines}, sort_keys=False, allow_unicode=True, width=10_000).rstrip()
