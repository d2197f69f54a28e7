"""What other cache sizes would do, as Prometheus sees it."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.core.reuse_estimator import CurvePoint


class ReuseCollector(Collector):
    """Reads the estimated curve when it is asked for; before there is traffic, there is none.

    read: the curve as it is now, from any thread. block_bytes: of one block in the pool.
    """

    def __init__(self, read: Callable[[], Sequence[CurvePoint]], *, block_bytes: int) -> None:
        self._read = read
        self._block_bytes = block_bytes

    def collect(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio",
            "Share of the prompt blocks of recent traffic that an LRU cache of this size would have had; a sample.",
            labels=["cache_bytes"],
        )
        error = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio_error", "One standard error of the estimate.", labels=["cache_bytes"]
        )
        for point in self._read():
            label = [str(point.capacity_blocks * self._block_bytes)]
            rate.add_metric(label, point.hit_rate)
            error.add_metric(label, point.error)
        yield rate
        yield error
