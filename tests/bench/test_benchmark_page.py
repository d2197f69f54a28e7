"""From measured values to the page of all results: what is shown, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import report
from benchmarks.__main__ import PEERS, chosen
from benchmarks.figures import Comparison, Figure, number
from benchmarks.memory import MIB, Residence, rows, size_of
from benchmarks.prefill import smallest_sufficient

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "amx_bf16": True, "avx512_bf16": False, "memory_gib": 8.0, "system": "Linux",
    "python": "3.11.7", "torch": "2.13.0",
}  # fmt: skip
NAMES = ["core", "prefill", "memory"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.012345, "0.0123"), (4.0, "4"), (99.96, "100"), (8412.4, "8,412"), (-250.0, "-250")]
)
def test_numbers_keep_three_digits_or_all_before_the_point(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_figure_is_held_against_its_own_target() -> None:
    row = Figure("rate", "tok/s", [3.0, 1.0, 2.0], 2.0, at_least=True)
    assert row.cells() == ["rate", "2 (1 to 3) tok/s", "", "", ">= 2", "yes"]
    assert Figure("time", "s", [2.1], 2.0).cells() == ["time", "2.1 s", "", "", "<= 2", "no"]
    assert Figure("shown", "s", [2.1]).met is None


def test_a_command_is_shown_without_paths_of_the_machine() -> None:
    given = ["--vllm-python", "/opt/vllm/bin/python", "--rounds", "3", "--out", "build/x"]
    assert report.command("benchmarks.vs_vllm", given) == ("python -m benchmarks.vs_vllm --vllm-python PATH --rounds 3")


def published(folder: Path, name: str, **changed: Any) -> None:
    about = {"title": f"About {name}", "command": f"run {name}", "date": "2026-01-02", "machine": MACHINE | changed}
    report.publish([Comparison(name, "s", "a", [1.0], "b", [2.0], 0.5)], about, folder / name)


def test_the_page_holds_what_was_measured_in_order_and_the_notes(tmp_path: Path) -> None:
    published(tmp_path, "memory")
    published(tmp_path, "core")
    page = report.page(tmp_path, NAMES, "Written by hand.\n")
    assert "Some CPU (amx_bf16), 2 cores, 8.0 GiB of memory, Linux, Python 3.11.7, torch 2.13.0." in page
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## About core", "## About memory", "## Notes"]
    assert "`run core` on 2026-01-02:\n\n| what |" in page
    assert "| core | a: 1 s | b: 2 s | 0.5 | <= 0.5 | yes |" in page
    assert page.endswith("## Notes\n\nWritten by hand.\n")


def test_results_of_different_machines_make_no_page(tmp_path: Path) -> None:
    published(tmp_path, "core")
    published(tmp_path, "memory", cores=4)
    with pytest.raises(ValueError, match="different machines or versions"):
        report.page(tmp_path, NAMES, "")


def test_all_raw_values_are_kept(tmp_path: Path) -> None:
    published(tmp_path, "core")
    (row,) = json.loads((tmp_path / "core.json").read_text())["rows"]
    assert (row["top"], row["bottom"], row["ratio"]["median"], row["met"]) == ([1.0], [2.0], 0.5, True)


def test_other_servers_are_only_compared_with_where_they_are() -> None:
    everything = [each.name for each in chosen(None, PEERS)]
    assert everything[-2:] == ["vs_llama_cpp", "vs_vllm"]
    assert [each.name for each in chosen(None, ())] == everything[:-2]
    assert [each.name for each in chosen(None, ["vs_vllm"])] == [*everything[:-2], "vs_vllm"]
    assert [each.name for each in chosen(["memory", "core"], PEERS)] == ["core", "memory"]


def test_the_smallest_chunk_that_is_nearly_the_best() -> None:
    assert smallest_sufficient({16: 50.0, 32: 89.0, 64: 90.0, 128: 100.0, 256: 95.0}, 0.9) == 64


def test_sizes_are_binary_where_they_say_so() -> None:
    assert (size_of("1GiB"), size_of("2MB")) == (2**30, 2_000_000)


@pytest.mark.parametrize(("last", "explained"), [(104, True), (106, False), (94, False)])
def test_memory_is_explained_within_five_percent_either_way(last: int, explained: bool) -> None:
    seen = Residence(loaded=50 * MIB, filled=90 * MIB, after={200: last * MIB, 1000: last * MIB})
    difference = rows(seen, weights=30 * MIB, pool=60 * MIB, constant=10 * MIB)[6]
    assert difference.met is explained


def test_growth_counts_from_the_first_batch_on() -> None:
    seen = Residence(loaded=0, filled=0, after={200: 98 * MIB, 400: 99 * MIB, 1000: 100 * MIB})
    growth, share = rows(seen, weights=0, pool=0, constant=100 * MIB)[-2:]
    assert growth.cells()[:2] == ["growth from request 200 to 1,000", "2 MiB"]
    assert (share.cells()[1], share.met) == ("2 %", False)
