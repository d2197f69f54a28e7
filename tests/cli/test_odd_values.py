"""Odd values for every option of every command: one sentence and exit code 2, or accepted; never a traceback."""

from pathlib import Path
from typing import Any

import pytest
import typer

from emberkv.cli.main import app

ODD = [
    "", " ", "-1", "0", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "9" * 400 + "GiB", "1.5", "\x1b[2J",
    "a\tb\n", "\udcff", "é" * 300, "/nonexistent/x", "/", "/dev/null", "~nobody-of-this-name", "{}", "[", "%s", "--",
    "true", "null",
]  # fmt: skip

NOWHERE = "/nonexistent/emberkv"

ENDED = {
    ("serve",): ["--print-config"],
    ("gateway",): ["--port", "0"],
    ("bench",): ["--url", "http://127.0.0.1:1"],
    ("calibrate",): ["--output", f"{NOWHERE}/profile.yaml"],
    ("explain",): ["--url", "http://127.0.0.1:1", "--text", "Hi"],
    ("launch",): ["claude", "--url", "http://127.0.0.1:1"],
    ("simulate",): [NOWHERE],
    ("plan",): [NOWHERE],
    ("examples",): ["nothing"],
    ("models",): [NOWHERE],
    ("size",): [NOWHERE],
    ("workload", "generate"): [NOWHERE, NOWHERE],
    ("workload", "describe"): [NOWHERE],
    ("workload", "convert"): [NOWHERE, "--output", NOWHERE],
    ("cache", "ls"): [NOWHERE],
    ("cache", "stats"): [NOWHERE],
    ("cache", "verify"): [NOWHERE],
    ("cache", "clear"): [NOWHERE],
    ("tenants", "key"): [],
    ("top",): ["--url", "http://127.0.0.1:1", "--once"],
    ("cluster", "up"): ["--secret-file", NOWHERE],
    ("cluster", "status"): ["--name", "none"],
    ("cluster", "scale"): ["2", "--name", "none"],
    ("cluster", "down"): ["--name", "none"],
    ("cluster", "hold-ray"): [NOWHERE, "1"],
}
"""Arguments with which each command ends before it does anything: it prints, or cannot read, write or ask. They come
first, but where a usable value after them would begin a measurement.
"""

COMMAND: Any = typer.main.get_command(app)


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not hasattr(command, "commands"):
        return {path: command}
    return {
        found: leaf for name, each in command.commands.items() for found, leaf in leaves(each, (*path, name)).items()
    }


COMMANDS = leaves(COMMAND)


class Tried:
    """Runs the command line in this process and looks at how it ends."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> None:
        shown = [each[:60] for each in arguments]
        with pytest.raises(SystemExit) as ended:
            COMMAND.main(list(arguments), prog_name="emberkv")
        printed = self._capsys.readouterr().err
        assert ended.value.code in (0, 2), shown
        if ended.value.code == 2:
            assert printed.startswith("error: "), f"{shown}: {printed}"
            assert len(printed.splitlines()) <= 3, f"{shown}: {printed}"
            for words in ("Input should", "Value error", "Traceback", "\x1b[2J"):
                assert words not in printed, f"{shown}: {printed}"


@pytest.fixture
def tried(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("EMBERKV_URL", raising=False)
    return Tried(capsys)


def test_every_command_is_tried() -> None:
    assert set(ENDED) == set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_odd_values_of_options(path: tuple[str, ...], tried: Tried) -> None:
    for param in COMMANDS[path].params:
        if param.param_type_name == "option" and not param.is_flag:
            for value in ODD:
                odd = [param.opts[0], *[value] * param.nargs]
                tried(*path, *odd, *ENDED[path]) if path == ("calibrate",) else tried(*path, *ENDED[path], *odd)


@pytest.mark.parametrize("value", [each for each in ODD if each != "--"], ids=lambda value: ascii(value[:12]))
def test_odd_models(value: str, tried: Tried) -> None:
    tried("serve", "--print-config", "--", value)


def test_odd_values_of_variables(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind one: a variable's text is read as the option's is."""
    for param in COMMANDS["serve",].params:
        for value in ("", " ", "-1", "nan", "9" * 5000, "\x1b[2J", "\udcff", "/nonexistent/x", "{}"):
            name = f"EMBERKV_{param.name.upper()}"
            monkeypatch.setenv(name, value)
            tried("serve", "--print-config")
            monkeypatch.delenv(name)
