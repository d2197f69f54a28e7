"""Commands in the README and the docs exist, with the options that they are written with."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from emberkv.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

OF_OTHER_PROGRAMS = {"CONTRIBUTING.md", "benchmarks.md"}
"""Pages that name options of pytest, pip and the benchmarks, too."""

COMMAND: Any = typer.main.get_command(app)


def documented(page: Path) -> Iterator[str]:
    """Each ``emberkv`` and ``scripts/serve`` command of a page's code blocks, as typed, without its comment."""
    fenced = False
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        match = re.match(r"(?:\$ )?((?:emberkv|scripts/serve)(?: .*)?)$", line if fenced else line.removeprefix("    "))
        if match and (fenced or line.startswith("    ")):
            yield re.sub(r"\s+#.*$", "", match[1])


COMMANDS = sorted({command for page in PAGES for command in documented(page)})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_accepted_by_the_parser(command: str) -> None:
    words = shlex.split(command)
    words[:1] = ["serve"] if words[0] == "scripts/serve" else []
    found = COMMAND
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    if words and words[0] in ("--version", "--help", "--install-completion"):
        return
    if "--help" not in words:
        found.make_context("emberkv", words)
    assert not hasattr(found, "commands"), f"{command} names no command"


def test_commands_are_found() -> None:
    assert {"emberkv serve --help", "scripts/serve"} < set(COMMANDS)
    assert len(COMMANDS) > 15


def options(command: Any) -> Iterator[str]:
    for param in command.params:
        yield from (*param.opts, *param.secondary_opts)
    for child in getattr(command, "commands", {}).values():
        yield from options(child)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OF_OTHER_PROGRAMS], ids=lambda page: page.name
)
def test_no_page_names_an_option_that_does_not_exist(page: Path) -> None:
    lines = r"^(aider|kubectl|llama-server|mooncake_master|python|vllm) (.*\\\n)*.*$"
    within_lines = r"`(kubernetes-validate|scripts/test) [^`]*`"
    text = re.sub(f"{lines}|{within_lines}", "", page.read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert named - set(options(COMMAND)) - {"--help"} == set()
