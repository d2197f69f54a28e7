"""Rates: a line through what work took, and sensible answers where the measurements do not make one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.loading import LatencyModel
from emberkv.errors import ConfigError


def measured(*observations: tuple[float, float], half_life: float = 32.0) -> LatencyModel:
    rate = LatencyModel(half_life)
    for amount, seconds in observations:
        rate.observe(amount, seconds)
    return rate


def test_nothing_is_known_before_a_measurement() -> None:
    assert LatencyModel().seconds_for(1) is None


def test_a_single_measurement_is_taken_in_proportion() -> None:
    assert measured((10, 5)).seconds_for(4) == pytest.approx(2.0)


def test_latency_and_rate_are_told_apart() -> None:
    rate = measured((1, 3), (10, 12), (4, 6))
    assert rate.seconds_for(1) == pytest.approx(3.0)
    assert rate.seconds_for(100) == pytest.approx(102.0)


def test_equal_amounts_are_taken_in_proportion() -> None:
    assert measured((10, 4), (10, 6), half_life=1e9).seconds_for(20) == pytest.approx(10.0)


def test_no_negative_latency() -> None:
    rate = measured((1, 0.0), (3, 4.0), half_life=1e9)
    assert rate.seconds_for(2) == pytest.approx(2.0)
    assert rate.seconds_for(0.001) == pytest.approx(0.001)


def test_no_negative_time_per_unit() -> None:
    assert measured((1, 5), (10, 1), half_life=1e9).seconds_for(1000) == pytest.approx(3.0)


def test_old_measurements_fade() -> None:
    rate = measured(*[(1, 100.0)] * 50, *[(1, 1.0)] * 20, half_life=1.0)
    assert rate.seconds_for(1) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1), (-1, 1), (1, -1), (float("nan"), 1), (1, float("nan"))])
def test_impossible_measurements_are_refused(amount: float, seconds: float) -> None:
    with pytest.raises(ConfigError, match="use an amount above 0"):
        LatencyModel().observe(amount, seconds)


def test_a_half_life_is_positive() -> None:
    with pytest.raises(ConfigError, match="half_life is 0"):
        LatencyModel(0)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e9), st.floats(0, 1e6)), min_size=1, max_size=30),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
)
def test_more_work_never_takes_less(observations: list[tuple[float, float]], one: float, other: float) -> None:
    rate = measured(*observations)
    shorter, longer = rate.seconds_for(min(one, other)), rate.seconds_for(max(one, other))
    assert shorter is not None
    assert longer is not None
    assert -1e-6 <= shorter <= longer
