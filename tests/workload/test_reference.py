"""docs/workloads.md and docs/simulation.md name every key of a workload file and a set-up, and no other."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from emberkv.sim.config import SetUp, SimulationConfig, TraceConfig
from emberkv.workload.spec import Arrivals, Distribution, GeneratedWorkload, Profile, SystemPrompts

DOCS = Path(__file__).parents[2] / "docs"


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    text = (DOCS / page).read_text()
    body = text[text.index(f"\n{heading}\n") :]
    table = re.search(r"\n((?:\|.*\n)+)", body)
    assert table is not None
    lines = table[1].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## The file", SetUp), ("## `workload`", GeneratedWorkload), ("### `system_prompts`", SystemPrompts),
        ("### `clients`", Profile), ("## `trace`", TraceConfig),
    ],
)  # fmt: skip
def test_every_key_has_its_row(heading: str, model: type[BaseModel]) -> None:
    assert [names(row[0])[0] for row in rows("workloads.md", heading)] == list(model.model_fields)


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("### `arrivals`", get_args(get_args(Arrivals)[0])),
        ("### Distributions", get_args(get_args(Distribution)[0])),
    ],
)
def test_every_kind_has_its_row_with_its_keys(heading: str, kinds: tuple[type[BaseModel], ...]) -> None:
    documented = {names(row[0])[0]: set(names(row[1])) for row in rows("workloads.md", heading)}
    known = {get_args(kind.model_fields["kind"].annotation)[0]: set(kind.model_fields) - {"kind"} for kind in kinds}
    assert documented == known


def test_every_key_of_a_set_up_is_explained() -> None:
    """An option stands for its key."""
    documented = {name.removeprefix("--").removeprefix("no-").replace("-", "_")
            for row in rows("simulation.md", "### Options and keys") for name in names(row[0])}  # fmt: skip
    internal = {"together"}
    assert set(SimulationConfig.model_fields) - documented == internal
