"""What the collectors of metrics share."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.engine.request import EngineStats


class EngineStatsCollector(Collector):
    """Reads the engine's figures when they are asked for; before there is an engine, there are none."""

    def __init__(self, read: Callable[[], EngineStats | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        if stats is not None:
            yield from self.families(stats)

    @abstractmethod
    def families(self, stats: EngineStats) -> Iterator[Metric]: ...


def labelled_counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """values: by the label's value."""
    return _filled(CounterMetricFamily(name, text, labels=[label]), values)


def labelled_gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """values: by the label's value."""
    return _filled(GaugeMetricFamily(name, text, labels=[label]), values)


def _filled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label_value(label)], value)
    return family


def label_value(text: str) -> str:
    """A few words as a label's value, which has no spaces."""
    return text.replace(" ", "_")
