"""The estimated curve as Prometheus reads it."""

from prometheus_client import CollectorRegistry

from emberkv.core.reuse_estimator import CurvePoint
from emberkv.serving.reuse_metrics import ReuseCollector

RATIO, ERROR = "emberkv_estimated_hit_ratio", "emberkv_estimated_hit_ratio_error"


def test_a_point_is_told_by_its_bytes() -> None:
    registry = CollectorRegistry()
    curve: list[CurvePoint] = []
    registry.register(ReuseCollector(lambda: curve, block_bytes=1024))
    assert registry.get_sample_value(RATIO, {"cache_bytes": "4096"}) is None
    curve += [CurvePoint(4, 0.25, 0.01), CurvePoint(8, 0.5, 0.02)]
    assert registry.get_sample_value(RATIO, {"cache_bytes": "4096"}) == 0.25
    assert registry.get_sample_value(RATIO, {"cache_bytes": "8192"}) == 0.5
    assert registry.get_sample_value(ERROR, {"cache_bytes": "8192"}) == 0.02
