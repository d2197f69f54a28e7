"""What Prometheus sees of the warmup."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.serving.metric_families import labelled_gauge
from emberkv.serving.warmup.warmup_report import WarmupPhase, WarmupReport


class WarmupCollector(Collector):
    """Reads the warmup's report when it is asked for."""

    def __init__(self, read: Callable[[], WarmupReport]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        report = self._read()
        prompts = {"warm": report.warm_prompts, "cold": report.prompts - report.warm_prompts}
        yield labelled_gauge("emberkv_warmup_prompts", "Prompts to be kept warm.", "state", prompts)
        phases = {each.value: float(each is report.phase) for each in WarmupPhase}
        yield labelled_gauge("emberkv_warmup_phase", "1 for how the warmup at the start stands.", "phase", phases)
        gauges = (
            ("emberkv_warmup_cached_tokens", "Tokens of these prompts that were cached when last seen.", report.tokens),
            ("emberkv_warmup_restored_prompts", "Learned prompts warmed at the start.", report.restored),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counters = (
            ("emberkv_warmup_seconds", "Time spent on warming.", report.seconds),
            ("emberkv_warmup_tokens", "Tokens computed to warm prompts.", report.computed_tokens),
            ("emberkv_warmup_timeouts", "Prompts whose warming ran out of time.", report.timeouts),
        )
        for name, text, total in counters:
            yield CounterMetricFamily(name, text, value=total)
