"""Work beside the requests, such as recording a trace. Where it ends or fails, metrics and /ready show that."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

T = TypeVar("T")

_log = logging.getLogger(__name__)


class BackgroundWork:
    """One activity. failures: how often a part of it failed and was left out. running: False once it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0
        self.running = True

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A part of the work. If it raises, that is counted, logged (the first time, the second, the fourth, ...), and
        the work goes on with the next part: requests do not depend on it.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - counted, and shown in /ready and /metrics
            self.failures += 1
            if self.failures & (self.failures - 1) == 0:
                _log.error("%s failed, %d times by now; it goes on", self.name, self.failures, exc_info=error)

    def guarded(self, observer: Callable[[T], None]) -> Callable[[T], None]:
        """The same observer, each call of which is an `attempt`."""

        def observe(news: T) -> None:
            with self.attempt():
                observer(news)

        return observe

    def ended(self, why: str) -> None:
        """It cannot go on."""
        self.running = False
        _log.error("%s has ended: %s", self.name, why)


class Background(Collector):
    """All background work of a server, by name; a collector of its metrics."""

    def __init__(self) -> None:
        self._works: dict[str, BackgroundWork] = {}

    def work(self, name: str) -> BackgroundWork:
        return self._works.setdefault(name, BackgroundWork(name))

    def as_json(self) -> dict[str, dict[str, object]]:
        return {work.name: {"running": work.running, "failures": work.failures} for work in self._all()}

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("emberkv_background_running", "1 until the work has ended early.", labels=["work"])
        failures = CounterMetricFamily(
            "emberkv_background_failures", "Parts of the work that failed and were left out.", labels=["work"]
        )
        for work in self._all():
            running.add_metric([work.name], work.running)
            failures.add_metric([work.name], work.failures)
        yield from (running, failures)

    def _all(self) -> list[BackgroundWork]:
        return list(self._works.values())
