"""The server's estimator on the Mooncake trace, against the exact curve of the same requests."""

from benchmarks.measured_elsewhere import MOONCAKE

from emberkv.core.analytics.reuse_estimator import ReuseEstimator
from emberkv.sim.curves import LRUCurve, accesses
from emberkv.workload.source import open_requests
from tests.sim.curves.build import CAPACITIES


def test_its_error_is_as_stated_and_small() -> None:
    seen = list(accesses(open_requests(MOONCAKE), 512))
    exact = LRUCurve(seen)
    estimator = ReuseEstimator(CAPACITIES)
    for access in seen:
        estimator.access(access.blocks)
    assert estimator.followed <= 8192
    for point in estimator.curve():
        off = abs(point.hit_rate - exact.at(point.capacity_blocks).block_rate)
        assert off < 0.02
        assert off < 2 * point.error
