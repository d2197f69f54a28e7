"""What other cache sizes would do, as Prometheus sees it."""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.serving.admin.reuse_watch import ReuseWatch


class ReuseCollector(Collector):
    """Reads the estimated curve when it is asked for; before there is traffic, there is none.

    read: the watch of the model that is served; None before it is loaded.
    """

    def __init__(self, read: Callable[[], ReuseWatch | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio",
            "Share of the prompt blocks of recent traffic that an LRU cache of this size would have had; a sample.",
            labels=["cache_bytes"],
        )
        error = GaugeMetricFamily(
            "emberkv_estimated_hit_ratio_error", "One standard error of the estimate.", labels=["cache_bytes"]
        )
        watch = self._read()
        if watch is not None:
            for point in watch.curve():
                label = [str(point.capacity_blocks * watch.block_bytes)]
                rate.add_metric(label, point.hit_rate)
                error.add_metric(label, point.error)
        yield rate
        yield error
