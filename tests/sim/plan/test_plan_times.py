"""The formulas, by hand: a machine that takes a millisecond for each token."""

import pytest

from emberkv.sim.build import machine_of
from emberkv.sim.hardware import TierRates
from emberkv.sim.plan_times import Formulas, demand_of
from emberkv.workload.request import Request
from tests.sim.plan.build import rates
from tests.workload.build import request


def arrivals(*times: float, prompt: int = 100, output: int = 10) -> list[Request]:
    return [request(str(index), prompt, output, at=at) for index, at in enumerate(times)]


def formulas(**changes: object) -> Formulas:
    """Of prompts of 100 tokens and answers of 10."""
    config = rates(**changes)
    return Formulas(machine_of(config, 16), config, demand_of(arrivals(0.0, 1.0)))


def test_demand_is_means_and_rates() -> None:
    demand = demand_of([*arrivals(0, 2), *arrivals(4, prompt=400, output=70)])
    assert (demand.requests, demand.rate, demand.prompt_tokens, demand.output_tokens) == (3, 0.5, 200, 30)
    assert demand.sample == [(100, 10), (100, 10), (400, 70)]


def test_the_busiest_stretch_is_told_from_the_mean() -> None:
    slow, fast = [float(at) for at in range(100)], [100 + at / 10 for at in range(1000)]
    demand = demand_of(arrivals(*slow, *fast))
    assert demand.rate == pytest.approx(1099 / 199.9)
    assert demand.busiest == pytest.approx(10, rel=0.02)


def test_what_comes_all_at_once_has_no_rate() -> None:
    demand = demand_of(arrivals(0, 0))
    assert (demand.rate, demand.busiest) == (None, None)


def test_a_first_token_waits_for_what_is_not_cached() -> None:
    assert formulas().times(0.0).first_token == pytest.approx(0.100)
    assert formulas().times(0.4).first_token == pytest.approx(0.060)


def test_a_request_takes_the_machine_for_its_prompt_and_its_share_of_decode_steps() -> None:
    assert formulas().times(0.0).requests_per_second == pytest.approx(1 / 0.110)
    assert formulas().times(0.5).requests_per_second == pytest.approx(1 / 0.060)


def test_the_last_token_is_always_computed() -> None:
    rates_ = TierRates(latency_us=0, read_gb_per_s=1e6, write_gb_per_s=1)
    assert formulas().times(0.0, 1.0, rates_).first_token == pytest.approx(0.001)


def test_steps_are_no_longer_than_their_budget() -> None:
    config = rates(max_step_tokens=30, prefill_chunk=16)
    slow_steps = config.model_copy(update={"rates": config.rates.model_copy(update={"per_step": 1.0})})
    found = Formulas(machine_of(slow_steps, 16), slow_steps, demand_of(arrivals(0.0, 1.0)))
    assert found.prefill(0, 100) == pytest.approx(4.1)
    assert found.prefill(100, 100) == 0


def test_a_tier_is_used_where_fetching_takes_less_than_computing() -> None:
    fast = TierRates(latency_us=1000, read_gb_per_s=0.004096, write_gb_per_s=1)  # 40 tokens of a KiB: 10 ms
    slow = TierRates(latency_us=1000, read_gb_per_s=0.0004096, write_gb_per_s=1)  # 100 ms
    loaded, computed = formulas().times(0.2, 0.4, fast), formulas().times(0.2, 0.4, slow)
    assert loaded.first_token == pytest.approx(0.040 + 0.011)
    assert loaded.requests_per_second == pytest.approx(1 / 0.050)
    assert computed == formulas().times(0.2)
