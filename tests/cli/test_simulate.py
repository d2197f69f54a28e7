"""The simulate command as a user runs it."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emberkv.cli.main import app
from tests.sim.test_config import WORKLOAD
from tests.workload.build import jsonl, mooncake_line

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.yaml") if "workload:" in path.read_text())
SIMULATION = """
simulation:
  rates: {per_prefill_token: 0.001, per_decode_token: 0.01}
  kv_blocks: 500
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture
def set_up(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(WORKLOAD + SIMULATION)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "t.jsonl", *(mooncake_line(at, 1100, [0, 1, at + 2]) for at in range(4)))


def test_a_yaml_file_end_to_end(tmp_path: Path, set_up: Path) -> None:
    rows, summary = tmp_path / "rows.csv", tmp_path / "summary.json"
    result = invoke(set_up, "--csv", rows, "--summary", summary)
    assert result.exit_code == 0, result.output
    assert "6 completed" in result.stdout
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6
    assert json.loads(summary.read_text())["requests"]["completed"] == 6
    again = tmp_path / "again.csv"
    assert invoke(set_up, "--csv", again).exit_code == 0
    assert again.read_bytes() == rows.read_bytes()


def test_a_trace_end_to_end(tmp_path: Path, trace: Path) -> None:
    summary = tmp_path / "summary.json"
    result = invoke(trace, "--model", "qwen2.5-7b", "--hardware", "l40s", "--replicas", "2", "--summary", summary,
                    "--routing", "round-robin", "--kv-blocks", "50", "--eviction", "lfu", "--seed", "3")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(summary.read_text())
    assert (found["block_size"], found["kv_blocks"]) == (512, 50)
    assert [each["requests"] for each in found["replicas"]] == [2, 2]
    assert found["set_up"]["eviction"] == "lfu"


def test_without_time_hits_are_counted_in_blocks(tmp_path: Path, trace: Path) -> None:
    result = invoke(trace, "--cache-only", "--kv-blocks", "100")
    assert result.exit_code == 0, result.output
    assert "6 of 12 found, 50.00%" in result.stdout
    assert "TTFT" not in result.stdout


def test_recorded_routing_decisions_are_made_again_one_by_one(tmp_path: Path, trace: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    assert invoke("--replicas", "3", "--record-decisions", log, trace).exit_code == 0
    assert len(log.read_text().splitlines()) == 4
    again = invoke("--replay-decisions", log)
    assert again.exit_code == 0, again.output
    assert "100.0% (4)" in again.stdout
    other = invoke("--replay-decisions", log, "--routing", "least-loaded")
    assert "least_loaded 4" in other.stdout


def test_decisions_are_recorded_of_several_replicas_and_replayed_without_a_workload(
    tmp_path: Path, trace: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    alone = invoke("--record-decisions", log, trace)
    assert (alone.exit_code, "needs 2 replicas" in alone.stderr) == (2, True)
    both = invoke("--replay-decisions", log, trace)
    assert (both.exit_code, "takes no workload" in both.stderr) == (2, True)


def test_a_report_is_a_page(tmp_path: Path, set_up: Path) -> None:
    page = tmp_path / "report.html"
    assert invoke(set_up, "--report", page).exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_two_set_ups_side_by_side(tmp_path: Path, set_up: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text(f"{SIMULATION}  prefix_caching: false\n")
    page = tmp_path / "both.html"
    result = invoke("--compare", set_up, other, "--report", page)
    assert result.exit_code == 0, result.output
    assert "a.yaml against b.yaml" in page.read_text()
    assert "Over the 6 requests that both completed" in result.stdout
    lines = {line.split("│")[1].strip(): line.split("│")[2:5] for line in result.stdout.splitlines() if "│" in line}
    left, right, change = (cell.strip() for cell in lines["hit rate, of prompt tokens"])
    assert float(left.removesuffix("%")) > 0
    assert (right, change) == ("0.0%", f"-{left.removesuffix('%')} points")


def test_set_ups_of_different_workloads_are_not_compared(tmp_path: Path, set_up: Path, trace: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text(WORKLOAD.replace("seed: 1", "seed: 2") + SIMULATION)
    result = invoke("--compare", set_up, other)
    assert result.exit_code == 2
    assert "the set-ups have different workloads" in result.stderr
    assert invoke(trace, "--compare", set_up, other).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a workload"),
        (["gone.yaml"], "gone.yaml cannot be read"),
        (["gone.jsonl"], "cannot read gone.jsonl"),
        (["gone.doc"], "gone.doc: a trace's name must end with .jsonl or .csv"),
    ],
)
def test_what_cannot_be_run_is_told(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_folder_in_place_of_a_trace_is_told(tmp_path: Path) -> None:
    assert invoke(tmp_path).stderr == f"error: {tmp_path} is a folder; give a trace's file\n"


def test_bad_options_are_told(tmp_path: Path, set_up: Path) -> None:
    for options, said in (
        (["--routing", "nearest"], "'nearest' is unknown; accepted: random"),
        (
            ["--csv", str(tmp_path / "no" / "rows.csv")],
            f"cannot write --csv {tmp_path}",
        ),
        (["--summary", str(tmp_path / "no" / "s.json")], "cannot write --summary"),
        (["--report", str(tmp_path)], "it is a folder"),
        (["--compare", str(set_up), str(set_up), "--csv", "x.csv"], "--compare writes no --csv"),
    ):
        result = invoke(set_up, *options)
        assert result.exit_code == 2
        assert said in result.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_as_they_are(path: Path) -> None:
    result = invoke(path, "--stop-at", "60")
    assert result.exit_code == 0, result.output
    assert "completed" in result.stdout


def test_it_says_first_what_it_computed_and_what_of_it_nobody_chose(trace: Path) -> None:
    lines = invoke(trace, "--hardware", "l40s").stdout.splitlines()
    assert lines[0].startswith("llama-3.1-8b (bf16) on L40S: 1 replica with 26.")
    assert lines[1] == "Model is the default; --model or the file's key simulation say otherwise."
    assert "otherwise" not in invoke(trace, "--hardware", "l40s", "--model", "qwen2.5-7b").stdout


def test_a_set_up_that_cannot_keep_up_is_warned_of(tmp_path: Path) -> None:
    lines = (mooncake_line(100 * at, 60_000, list(range(200 * at, 200 * at + 118))) for at in range(40))
    slow = jsonl(tmp_path / "t.jsonl", *lines)
    result = invoke(slow, "--hardware", "l40s", "--replicas", "2")
    assert result.exit_code == 0, result.output
    assert "requests a second: the queue grows without end; " in result.stderr


def test_what_is_written_is_confirmed(tmp_path: Path, set_up: Path) -> None:
    rows, summary = tmp_path / "r.csv", tmp_path / "s.json"
    assert f"Wrote {rows}, {summary}." in invoke(set_up, "--csv", rows, "--summary", summary).stderr
    computed = json.loads(summary.read_text())["computed"]
    assert (computed["model"], computed["replicas"], computed["kv_blocks"]) == (None, 1, 500)


@pytest.mark.parametrize("extra", [[], ["--cache-only"]])
def test_a_trace_without_requests_is_an_error(tmp_path: Path, extra: list[str]) -> None:
    path = jsonl(tmp_path / "t.jsonl", '{"emberkv_trace": 1}')
    result = invoke(path, *extra)
    assert result.exit_code == 2
    assert "has no requests" in result.stderr


RECORDED = (
    '{"emberkv_trace": 1, "model": "%s"}',
    '{"request":"a","arrival":0.0,"prompt_tokens":30,"output_tokens":4}',
)


def test_a_recording_is_simulated_with_the_model_that_served_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", RECORDED[0] % "emberkv-demo", RECORDED[1])
    first = invoke(path, "--hardware", "cpu-2core").stdout.splitlines()[0]
    assert first.startswith("emberkv-demo (bf16) on two-core CPU: 1 replica")
    assert invoke(path, "--model", "qwen2.5-0.5b").stdout.startswith("qwen2.5-0.5b (bf16) on H100")


def test_a_recording_of_a_model_of_unknown_shape_names_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", RECORDED[0] % "some/model", RECORDED[1])
    output = invoke(path).stdout
    assert "The recording was served by some/model, whose shape is not known here" in output
    assert "llama-3.1-8b" in output


@pytest.mark.parametrize(("option", "name"), [("--list-models", "qwen3-30b-a3b"), ("--list-hardware", "rtx4090")])
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_known_names_are_listed(command: str, option: str, name: str) -> None:
    result = CliRunner().invoke(app, [command, option])
    assert result.exit_code == 0, result.output
    assert name in result.stdout
