"""What the estimator says of other cache sizes: exact where it follows all blocks, else within its stated error."""

from hashlib import sha256
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.analytics.reuse_estimator import CurvePoint, LRUStack, ReuseEstimator
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError


def name(*path: int) -> BlockHash:
    return sha256(str(path).encode()).digest()


def chain(root: int, length: int) -> list[BlockHash]:
    return [name(root, position) for position in range(length)]


def exact_rate(requests: list[list[BlockHash]], capacity: int) -> float:
    stack: LRUStack[BlockHash] = LRUStack()
    hits = 0
    for blocks in requests:
        hits += sum(1 for depth in stack.depths(blocks) if depth is not None and depth <= capacity)
        stack.use(blocks)
    return hits / sum(map(len, requests))


def skewed_requests(count: int) -> list[list[BlockHash]]:
    """Prompts of 1 to 30 blocks from 400 families, a few of them popular."""
    rng = Random(7)
    return [chain(int(400 * rng.random() ** 3), rng.randint(1, 30)) for _ in range(count)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=60))
def test_following_every_block_is_exact(drawn: list[tuple[int, int]]) -> None:
    requests = [chain(root, length) for root, length in drawn]
    estimator = ReuseEstimator([6, 10, 20], max_followed=100)
    for blocks in requests:
        estimator.access(blocks)
    points = estimator.curve()
    assert [point.capacity_blocks for point in points] == [6, 10, 20]
    assert [point.error for point in points] == [0, 0, 0]
    assert [point.hit_rate for point in points] == pytest.approx([exact_rate(requests, size) for size in (6, 10, 20)])


def test_a_sample_is_within_its_stated_error_and_within_its_memory() -> None:
    requests = skewed_requests(6000)
    capacities = [500, 1000, 2000, 4000]
    estimator = ReuseEstimator(capacities, max_followed=800)
    for blocks in requests:
        estimator.access(blocks)
        assert estimator.followed <= 800
    assert estimator.share == pytest.approx(0.2)
    for point in estimator.curve():
        assert 0 < point.error < 0.05
        assert abs(point.hit_rate - exact_rate(requests, point.capacity_blocks)) < 3 * point.error


def test_while_memory_suffices_the_curve_is_exact_however_large_the_capacities() -> None:
    requests = [chain(root % 5, 4) for root in range(15)]
    estimator = ReuseEstimator([10, 1_000_000], max_followed=20)
    for blocks in requests:
        estimator.access(blocks)
    assert estimator.share == 1
    assert [point.hit_rate for point in estimator.curve()] == pytest.approx([exact_rate(requests, 10), 40 / 60])
    estimator.access(chain(99, 4))
    assert estimator.share < 1
    assert estimator.followed <= 20


def test_a_larger_cache_never_has_a_lower_rate() -> None:
    estimator = ReuseEstimator([4000, 500, 1000, 500], max_followed=300)
    for blocks in skewed_requests(1000):
        estimator.access(blocks)
    rates = [point.hit_rate for point in estimator.curve()]
    assert [point.capacity_blocks for point in estimator.curve()] == [500, 1000, 4000]
    assert rates == sorted(rates)


def test_what_a_request_leaves_behind_can_be_hit_and_is_not_counted_as_looked_up() -> None:
    estimator = ReuseEstimator([16])
    estimator.access(chain(1, 2))
    estimator.keep(chain(1, 4))
    estimator.access(chain(1, 4))
    [point] = estimator.curve()
    assert point == CurvePoint(16, point.hit_rate, 0)
    assert point.hit_rate == pytest.approx(4 / 6)


def test_old_traffic_counts_half_after_each_half_life() -> None:
    estimator = ReuseEstimator([16], half_life=4)
    estimator.access(chain(1, 4))  # 4 misses, which then weigh 2
    estimator.access(chain(1, 2))  # 2 hits
    assert estimator.curve()[0].hit_rate == pytest.approx(2 / 4)


def test_there_is_no_curve_before_traffic() -> None:
    estimator = ReuseEstimator([16])
    estimator.access([])
    assert estimator.curve() == []


@pytest.mark.parametrize("options", [{"capacities": []}, {"capacities": [0]}, {"max_followed": 0}, {"half_life": 0}])
def test_numbers_that_cannot_work_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        ReuseEstimator(**{"capacities": [1], **options})
