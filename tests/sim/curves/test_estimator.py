"""The server's estimator on the Mooncake trace, against the exact curve of the same requests."""

from emberkv.core.analytics.reuse_estimator import ReuseEstimator
from emberkv.sim.curves import Access, LRUCurve
from tests.sim.curves.build import CAPACITIES


def test_its_error_is_as_stated_and_small(mooncake: list[Access], mooncake_curve: LRUCurve) -> None:
    estimator = ReuseEstimator(CAPACITIES)
    for access in mooncake:
        estimator.access(access.blocks)
    assert estimator.followed <= 8192
    for point in estimator.curve():
        off = abs(point.hit_rate - mooncake_curve.at(point.capacity_blocks).block_rate)
        assert off < 0.02
        assert off < 2 * point.error
