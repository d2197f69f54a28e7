"""The statistics of the prober's tests and benchmark, against values worked out by hand."""

from random import Random

import pytest
from benchmarks.rank_test import auc, p_value


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [4, 5], 1.0),
        ([4, 5], [1, 2, 3], 0.0),
        ([1, 1], [1, 1, 1], 0.5),
        ([1, 3], [2, 4], 0.75),  # of four pairs, only 3 and 2 are the other way round
        ([1, 2], [2], 0.75),  # one pair in order, one tie
    ],
)
def test_auc(first: list[float], second: list[float], expected: float) -> None:
    assert auc(first, second) == expected


def test_p_value_of_all_in_order_is_that_of_the_two_extreme_arrangements() -> None:
    chance = p_value([1, 2, 3, 4], [5, 6, 7, 8], Random(0), rounds=20_000)
    assert chance == pytest.approx(2 / 70, rel=0.15)  # 8 choose 4 arrangements


def test_p_value_where_nothing_differs_is_one() -> None:
    assert p_value([1, 1, 1], [1, 1, 1], Random(0)) == 1


def test_p_values_of_alike_samples_are_spread_evenly() -> None:
    random = Random(0)
    chances = [
        p_value([random.random() for _ in range(20)], [random.random() for _ in range(20)], random, rounds=200)
        for _ in range(200)
    ]
    assert 0.02 < sum(chance <= 0.1 for chance in chances) / 200 < 0.2
