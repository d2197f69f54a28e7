"""What a description draws, and what is refused in it."""

import statistics
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import TypeAdapter

from emberkv.errors import WorkloadError
from emberkv.workload.spec import (
    PRESETS,
    Arrivals,
    Constant,
    Distribution,
    Gamma,
    Poisson,
    load_workload,
    parse_workload,
)
from tests.workload.build import CHAT, jsonl, mooncake_line, workload

distribution: TypeAdapter[Any] = TypeAdapter(Distribution)
arrivals: TypeAdapter[Arrivals] = TypeAdapter(Arrivals)


def draws(description: Any, count: int = 20_000) -> list[float]:
    drawn, rng = distribution.validate_python(description), Random(1)
    return sorted(drawn.sample(rng) for _ in range(count))


def test_a_plain_number_is_fixed() -> None:
    assert draws(7, 3) == draws({"kind": "fixed", "value": 7}, 3) == [7, 7, 7]


def test_uniform_stays_between_its_bounds() -> None:
    found = draws({"kind": "uniform", "min": 10, "max": 20})
    assert 10 <= found[0] < found[-1] <= 20
    assert statistics.fmean(found) == pytest.approx(15, rel=0.02)


def test_lognormal_has_its_median_and_p90() -> None:
    found = draws({"kind": "lognormal", "median": 10, "p90": 161})
    assert (found[10_000], found[18_000]) == (pytest.approx(10, rel=0.05), pytest.approx(161, rel=0.05))


def test_exponential_has_its_mean_and_clips() -> None:
    assert statistics.fmean(draws({"kind": "exponential", "mean": 50})) == pytest.approx(50, rel=0.03)
    clipped = draws({"kind": "exponential", "mean": 50, "min": 20, "max": 60})
    assert (clipped[0], clipped[-1]) == (20, 60)


def test_geometric_has_its_mean_in_whole_numbers_from_one() -> None:
    found = draws({"kind": "geometric", "mean": 3})
    assert found[0] == 1
    assert set(map(type, found)) == {int}
    assert statistics.fmean(found) == pytest.approx(3, rel=0.03)
    assert draws({"kind": "geometric", "mean": 1}, 3) == [1, 1, 1]


def test_empirical_draws_from_values_or_from_a_trace_beside_the_description(tmp_path: Path) -> None:
    assert set(draws({"kind": "empirical", "values": [3, 5]}, 100)) == {3, 5}
    jsonl(tmp_path / "t.jsonl", mooncake_line(0, 600, [0, 1], 11), mooncake_line(0, 700, [0, 2], 12))
    drawn = distribution.validate_python(
        {"kind": "empirical", "trace": "t.jsonl", "field": "output_tokens"}, context={"folder": tmp_path}
    )
    rng = Random(1)
    assert {drawn.sample(rng) for _ in range(100)} == {11, 12}


@pytest.mark.parametrize(
    ("process", "variation"),
    [
        (Poisson(kind="poisson", rate=4), 1),
        (Gamma(kind="gamma", rate=4, burstiness=2.5), 2.5),
        (Gamma(kind="gamma", rate=4, burstiness=0.5), 0.5),
        (Constant(kind="constant", rate=4), 0),
    ],
)
def test_gaps_have_the_rate_and_the_burstiness(process: Arrivals, variation: float) -> None:
    gaps = [after - before for before, after in pairwise(islice(process.times(Random(1)), 40_000))]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(0.25, rel=0.04)
    assert statistics.pstdev(gaps) / mean == pytest.approx(variation, rel=0.04, abs=1e-6)


def test_arrivals_can_be_those_of_a_trace(tmp_path: Path) -> None:
    jsonl(tmp_path / "t.jsonl", mooncake_line(500, 1, [0]), mooncake_line(2000, 1, [0]))
    timed = arrivals.validate_python({"kind": "trace", "trace": "t.jsonl"}, context={"folder": tmp_path})
    assert list(timed.times(Random(1))) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("changes", "client", "said"),
    [
        (
            {"arrivals": {"kind": "weibull", "rate": 1}},
            {},
            "'weibull' .* expected tags: 'poisson', 'gamma', 'constant'",
        ),
        ({"arrivals": {"kind": "gamma", "rate": 1}}, {}, "arrivals.gamma.burstiness: it is required"),
        ({"arrivals": {"kind": "poisson", "rate": 1, "cv": 2}}, {}, "unknown: cv; accepted: kind, rate"),
        ({"arrivals": {"kind": "poisson", "rate": 0}}, {}, "use at least 1e-09"),
        ({"arrivals": {"kind": "poisson", "rate": float("inf")}}, {}, "use a finite number"),
        ({}, {"message": {"kind": "zipf", "a": 1}}, "'zipf' .* expected tags: 'fixed', 'uniform', 'lognormal'"),
        ({}, {"message": {"kind": "lognormal", "median": 9, "p90": 3}}, "p90 3 is below the median 9"),
        ({}, {"message": {"kind": "uniform", "min": 9, "max": 3}}, "min 9 is above max 3"),
        ({}, {"message": "20"}, "message '20': use keys with values"),
        ({}, {"message": {"kind": "empirical"}}, "give either values, or trace and field"),
        ({}, {"message": {"kind": "empirical", "values": []}}, "at least one is needed"),
        ({}, {"thinktime": 4}, "unknown: thinktime; accepted: name, weight, base,"),
        ({}, {"base": "robot"}, "base is 'robot'; accepted: agent"),
        ({}, {"system_prompts": "x"}, "system_prompts 'x'; described are: none"),
        ({"seeds": 3}, {}, "unknown: seeds; accepted: seed, arrivals,"),
        ({"seed": "1"}, {}, "seed '1': use a whole number"),
        ({"sessions": None}, {}, "give duration .seconds., sessions, or both"),
        ({"clients": []}, {}, "clients: give at least 1"),
        ({"clients": [CHAT, CHAT]}, {}, "clients are named chat, chat; each needs a name of its own"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused_by_name(
    changes: dict[str, Any], client: dict[str, Any], said: str
) -> None:
    with pytest.raises(WorkloadError, match=said):
        workload(client=client, **changes)


def test_a_trace_that_is_missing_is_told(tmp_path: Path) -> None:
    lost = {"kind": "empirical", "trace": "gone.jsonl", "field": "prompt_tokens"}
    with pytest.raises(WorkloadError, match=r"cannot read .*gone\.jsonl"):
        workload(tmp_path, client={"message": lost})


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "is not YAML"), ("- 1", "no key 'workload'"), ("workload: 3", "workload: 3: use keys with values")],
)
def test_a_file_that_is_no_description_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=rf"w\.yaml.*{said}"):
        load_workload(path)


def test_an_agent_grows_by_what_was_measured() -> None:
    """A step adds the answer and the next message: a median of 653 tokens; think times have median 10 s, p90 161 s."""
    message, output = distribution.validate_python(PRESETS["agent"]["message"]), PRESETS["agent"]["output"]
    answer, rng = distribution.validate_python(output), Random(1)
    growth = statistics.median(message.sample(rng) + answer.sample(rng) for _ in range(40_000))
    assert growth == pytest.approx(653, rel=0.03)
    assert PRESETS["agent"]["think_time"] == {"kind": "lognormal", "median": 10, "p90": 161}


def test_a_profile_goes_before_its_base() -> None:
    data = {"seed": 1, "sessions": 1, "arrivals": {"kind": "constant", "rate": 1}}
    client = {"name": "coder", "weight": 1, "base": "agent", "turns": 2}
    parsed = parse_workload({**data, "clients": [client]}, folder=Path())
    assert parsed.clients[0].turns.sample(Random(1)) == 2
    assert parsed.clients[0].max_context == 128_000
