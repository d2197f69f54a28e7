"""The examples run as they are, and come with the package."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.main import app
from emberkv.serving.canonical import load_rules
from emberkv.serving.tenancy import key_digest, read_tenants

FOLDER = Path(__file__).parents[2] / "examples"
FILES = sorted(FOLDER.glob("*.yaml"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_all_are_listed_with_what_they_are() -> None:
    listed = dict(line.split(None, 1) for line in run("examples").stdout.splitlines())
    assert listed.keys() == {path.stem for path in FILES}
    assert listed["chat"] == "Assistants used by people"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_printed_as_it_is(path: Path) -> None:
    assert run("examples", path.stem).stdout == path.read_text()


def test_one_that_is_not_there_is_refused_with_what_was_meant() -> None:
    result = run("examples", "chats")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no example 'chats'; did you mean 'chat'?" in result.stderr


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in ("canonical", "tenants")], ids=lambda path: path.stem
)
def test_each_workload_is_simulated(path: Path) -> None:
    is_workload = "workload:" in path.read_text()
    what = [str(path)] if is_workload else ["--compare", str(FOLDER / "chat.yaml"), str(path)]
    result = run("simulate", *what, "--stop-at", "10")
    assert result.exit_code == 0, result.output


def test_the_rules_can_be_loaded() -> None:
    assert [rule.name for rule in load_rules(FOLDER / "canonical.yaml").lines][:2] == ["session-id", "request-id"]


def test_the_keys_that_the_tenants_file_names_are_let_in() -> None:
    path = FOLDER / "tenants.yaml"
    named = re.findall(r'"([\w-]+-example-key)"', path.read_text())
    digests = {key.digest({}) for tenant in read_tenants(path).tenants.values() for key in tenant.keys}
    assert len(named) == 2
    assert digests == {key_digest(key) for key in named}


def test_a_new_key_comes_with_the_line_that_lets_it_in(tmp_path: Path) -> None:
    key, line = (each.split(": ", 1)[1] for each in run("tenants", "key").stdout.splitlines())
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants:\n  a:\n    keys:\n      {line}\n")
    assert read_tenants(path).tenants["a"].keys[0].digest({}) == key_digest(key)
    assert len(key) >= 40
    assert run("tenants", "key").stdout.split()[1] != key
