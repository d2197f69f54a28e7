"""The plan command: tables and words in the terminal, everything in the JSON, errors with their reason."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from emberkv.cli.main import app
from tests.sim.test_config import WORKLOAD
from tests.workload.build import jsonl, mooncake_line

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.95,396,109\n"


def plan(*arguments: str | Path, columns: int = 200) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": str(columns)})
    return outcome.exit_code, outcome.output


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations of three turns, taking turns."""
    turns = [mooncake_line(1000 * at, 512 * (at + 1), [100 * who + n for n in range(at + 1)])
             for at in range(3) for who in (1, 2)]  # fmt: skip
    return jsonl(tmp_path / "talk.jsonl", *turns)


def test_a_trace_is_planned_with_figures_that_can_be_checked(trace: Path, tmp_path: Path) -> None:
    code, output = plan(trace, "--json", tmp_path / "plan.json")
    assert code == 0, output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["unlimited"] == pytest.approx(6 / 12)  # of 2 x (1 + 2 + 3) blocks, 2 x (1 + 2) were there before
    assert found["block_size"] == 512
    assert found["block_bytes"] == 512 * 131_072
    assert found["enough"] == 5 * 512 * 131_072  # the first conversation's two blocks under the other's three
    assert found["set_ups"][0]["simulated"]["completed"] == 6
    assert found["recommendation"][0].startswith("Of all prompt tokens, 50.0% can be reused")
    for sentence in found["recommendation"]:
        assert " ".join(sentence.split()) in " ".join(output.split())


def test_formulas_alone_simulate_nothing(trace: Path, tmp_path: Path) -> None:
    code, _ = plan(trace, "--no-simulate", "--replicas", "2", "--json", tmp_path / "plan.json")
    assert code == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {point["simulated"] for point in found["set_ups"]} == {None}
    assert {point["replicas"] for point in found["set_ups"]} == {2}


def test_titles_and_tables_fit_a_narrow_terminal(trace: Path) -> None:
    _, output = plan(trace, columns=80)
    lines = [line.rstrip() for line in output.splitlines()]
    (title,) = (at for at, line in enumerate(lines) if line.startswith("Set-ups, "))
    assert lines[title].endswith("GiB of KV memory")
    assert [heading.strip() for heading in lines[title + 2].split("┃")][-4:-1] == ["TTFT", "p99", "req/s"]
    assert "sim" in {cell.strip() for line in lines for cell in line.split("│")}
    assert all(len(line) <= 80 for line in lines)


def test_it_ends_with_what_to_get(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, output = plan(trace, "--price-per-hour", "2.5", "--report", page, "--json", tmp_path / "p.json")
    assert code == 0, output
    get = json.loads((tmp_path / "p.json").read_text())["get_this"]
    assert get[0].startswith("Get 1 replica on 1 x H100 SXM, with ")
    assert get[0].endswith(": $2.50 an hour.")
    assert output.index(get[0]) > output.index("Of all prompt tokens")
    assert get[0] in page.read_text()


def test_a_service_level_of_the_file_or_an_option_is_planned_for(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(WORKLOAD + "simulation: {model: qwen2.5-0.5b, slo: {ttft_ms: 0.001}}")
    _, output = plan(path)
    assert "No set-up tried serves this workload." in output
    _, output = plan(path, "--ttft-p99", "60000")
    assert "time to first token p99 within 60 s" in " ".join(output.split())


def test_a_trace_of_lengths_only_promises_nothing_of_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    code, output = plan(path)
    assert code == 0, output
    assert "does not say what prompts share" in output
    assert "Share of prompt tokens found" not in output


def test_a_description_is_planned_with_its_own_set_up(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    client = {"name": "a", "weight": 1, "message": 50, "output": 10, "turns": 3, "think_time": 1}
    arrivals = {"kind": "constant", "rate": 1}
    workload = {"seed": 1, "sessions": 5, "arrivals": arrivals, "clients": [client]}
    path.write_text(yaml.safe_dump({"workload": workload, "simulation": {"hardware": "a100", "eviction": "lfu"}}))
    code, output = plan(path, "--no-simulate")
    assert code == 0, output
    assert "lfu" in output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "nothing-known"], "no model 'nothing-known'"),
        (["--hardware", "abacus"], "no hardware 'abacus'"),
        (["--eviction", "clairvoyant"], "accepted: lru"),
        (["--json", "/no/such/folder/plan.json"], "cannot write --json /no/such/folder/plan.json: there is no folder"),
    ],
)
def test_what_cannot_be_planned_is_an_error_with_its_reason(trace: Path, options: list[str], reason: str) -> None:
    code, output = plan(trace, "--no-simulate", *options)
    assert code == 2
    assert reason in output


def test_a_missing_trace_is_an_error_that_names_it(tmp_path: Path) -> None:
    code, output = plan(tmp_path / "none.jsonl")
    assert code == 2
    assert "none.jsonl" in output
