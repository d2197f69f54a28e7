"""Help in 80 columns, and errors of the command line as one sentence."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from emberkv import __version__
from emberkv.cli.command import SUMMARY_CHARACTERS, printable
from emberkv.cli.main import EmberKV, app

COMMAND = typer.main.get_command(app)


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, with the words that call it."""
    yield path, command
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))


COMMANDS = dict(walk(COMMAND))


def printed(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).output


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_cuts_no_name(path: tuple[str, ...]) -> None:
    text = printed(*path, "--help")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert not any(re.search(r"--[\w-]*-$", line) for line in lines), "an option's name goes on in the next line"
    for param in COMMANDS[path].params:
        if param.param_type_name == "option" and not param.hidden:
            assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in param.opts + param.secondary_opts)
    assert not re.search(r"<\w+(\[\w+\])?>", text), "a Python type stands for a value"


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if isinstance(command, TyperGroup)])
def test_a_group_alone_prints_its_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, path)
    assert result.exit_code == 0
    assert result.stdout == CliRunner().invoke(app, [*path, "--help"]).stdout


def test_the_list_of_commands_has_the_first_sentence_of_each_ones_help() -> None:
    assert app.info.cls is EmberKV
    summaries = {name: deferred.summary for name, deferred in EmberKV.deferred.items()}
    assert summaries == {name: COMMAND.commands[name].get_short_help_str(SUMMARY_CHARACTERS) for name in summaries}


IMPORTED = """
import sys
from emberkv.cli.main import app
try:
    app(sys.argv[1:], prog_name="emberkv")
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ("--help", set[str]()),
        ("--version", set[str]()),
        ("examples", set[str]()),
        ("models --help", {"emberkv.cli.models"}),
        ("top --help", {"emberkv.cli.top"}),
    ],
)
def test_a_command_imports_no_other_commands_module(arguments: str, own: set[str]) -> None:
    command = [sys.executable, "-c", IMPORTED, *arguments.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout
    loaded = set(run.stderr.split())
    modules = {deferred.target.partition(":")[0] for deferred in EmberKV.deferred.values()}
    assert loaded & modules == own
    assert loaded.isdisjoint({"fastapi", "matplotlib", "numpy", "torch", "uvicorn"})


@pytest.mark.parametrize("arguments", ["serve --port 0 /nonexistent/model", "models /nonexistent/model"])
def test_a_wrong_path_is_refused_before_pytorch_is_imported(arguments: str) -> None:
    command = [sys.executable, "-c", IMPORTED, *arguments.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    assert "error: no folder '/nonexistent/model' exists" in run.stderr
    assert {"torch", "transformers"}.isdisjoint(run.stderr.split())


def test_a_hidden_command_is_not_in_its_groups_help() -> None:
    assert COMMANDS["cluster", "hold-ray"].hidden
    assert "hold-ray" not in printed("cluster", "--help")


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option: str) -> None:
    assert printed(option) == f"emberkv {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("simulate --replicas 0", "--replicas '0': use at least 1"),
        ("simulate --replicas x", "--replicas 'x': use a whole number"),
        ("bench --url u --timeout soon", "--timeout 'soon': use a number"),
        ("bench --url u --endpoint chats", "--endpoint 'chats': use one of 'chat', 'completions'"),
        ("bench", "missing option '--url'"),
        ("workload convert -o x", "missing argument 'inputs'"),
        (
            "serve --cache-ran 4GiB",
            "no such option: --cache-ran (Possible options: --cache-dir, --cache-disk, --cache-ram)",
        ),
        ("simulat", "no such command 'simulat'. Did you mean 'simulate'?"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: str, message: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    first, hint = result.stderr.splitlines()
    assert first.startswith(f"error: {message}")
    assert re.fullmatch(r"Try 'emberkv[\w ]* --help'\.", hint)


def test_control_characters_and_surrogates_of_a_message_are_escaped() -> None:
    assert printable("a\x1b[2J\tb\udcff\nc é") == "a\\x1b[2J\\tb\\udcff\nc é"
