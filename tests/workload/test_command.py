"""The commands as a user runs them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.workload import app
from emberkv.workload.trace import read_trace
from tests.workload.build import jsonl, mooncake_line

DESCRIPTION = """
workload:
  seed: 1
  sessions: 2
  arrivals: {kind: constant, rate: 1}
  clients:
    - {name: chat, weight: 1, message: 20, output: 11, turns: 2, think_time: 4}
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "chat.yaml"
    path.write_text(DESCRIPTION)
    return path


def test_generate_states_the_times_it_assumed(tmp_path: Path, description: Path) -> None:
    output = tmp_path / "t.jsonl"
    result = invoke("generate", description, output, "--first-token", "1", "--per-token", "0.1")
    assert result.exit_code == 0, result.output
    assert "4 requests" in result.stderr
    assert "assumed 1 s to the first token and 0.1 s for each further one" in output.read_text().splitlines()[0]
    assert [each.arrival_time for each in read_trace(output)] == [0.0, 1.0, 6.0, 7.0]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, description: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        invoke("generate", description, tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() != b""


def test_describe_prints_a_table(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", mooncake_line(0, 10, [0, 1, 2]), mooncake_line(1000, 10, [0, 1, 3]))
    result = invoke("describe", path, "--trace-block-size", "4")
    assert result.exit_code == 0
    for said in ("2 over 1.0 s, 1.00 a second", "6 references, 4 unique", "2 prefix hits, 33.3%", "8 of 20, 40.0%"):
        assert said in result.stdout


def test_describe_prints_json(description: Path) -> None:
    result = invoke("describe", description, "--json", "--block-size", "10")
    found = json.loads(result.stdout)
    assert (found["requests"], found["sessions"], found["longest_session"]) == (4, 2, 2)
    assert found["unlimited_cache"]["block_hits"] == 6
    assert "Assumed 0.5 s" in result.stderr


def test_convert_merges_clips_and_speeds_up(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", mooncake_line(0, 10, [0]), mooncake_line(4000, 10, [0]))
    two = jsonl(tmp_path / "two.jsonl", mooncake_line(2000, 10, [0]), mooncake_line(9000, 10, [0]))
    output = tmp_path / "out.jsonl"
    result = invoke("convert", one, two, "-o", output, "--start", "1", "--stop", "5", "--rate", "2")
    assert result.exit_code == 0, result.output
    found = list(read_trace(output))
    assert [(each.request_id, each.arrival_time) for each in found] == [("two-0", 0.5), ("one-1", 1.5)]
    assert found[0].content != found[1].content


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["describe", "gone.jsonl"], "gone.jsonl: No such file"),
        (["describe", "empty.csv"], "empty.csv has no requests"),
        (["describe", "t.jsonl", "--from", "azure"], "t.jsonl:1: the header is"),
        (["generate", "t.jsonl", "out.jsonl"], "t.jsonl is not a .yaml file"),
        (["convert", "t.jsonl", "-o", "out.jsonl", "--rate", "0"], "must be above 0"),
    ],
)
def test_errors_are_told_in_a_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    """Arguments with a suffix are files of the test's folder."""
    jsonl(tmp_path / "t.jsonl", mooncake_line(0, 10, [0]))
    (tmp_path / "empty.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    result = invoke(*(tmp_path / each if "." in each else each for each in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_file_that_exists_is_replaced_only_if_asked(tmp_path: Path, description: Path, command: str) -> None:
    trace = jsonl(tmp_path / "t.jsonl", mooncake_line(0, 600, [0, 1]))
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    arguments = [description, output] if command == "generate" else [trace, "--output", output]
    refused = invoke(command, *arguments)
    assert refused.exit_code == 2
    assert "out.jsonl exists; name another file, or replace it with --overwrite" in refused.stderr
    assert output.read_text() == "precious"
    assert invoke(command, *arguments, "--overwrite").exit_code == 0
    assert len(list(read_trace(output))) > 0
