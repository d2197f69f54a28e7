"""Arrival processes: when new conversations begin."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from emberkv.validation import Strict
from emberkv.workload.bounds import LatencyModel
from emberkv.workload.distributions import folder_of
from emberkv.workload.trace import read_trace


def _apart(gap: Callable[[], float]) -> Iterator[float]:
    """Times without end, each a drawn gap after the one before; the first, after 0."""
    now = 0.0
    while True:
        now += gap()
        yield now


class Poisson(Strict):
    """``rate`` conversations a second, independent of each other."""

    kind: Literal["poisson"]
    rate: LatencyModel

    def times(self, rng: Random) -> Iterator[float]:
        return _apart(lambda: rng.expovariate(self.rate))


class Gamma(Strict):
    """``rate`` a second with gamma gaps. burstiness: the gaps' coefficient of variation; 1 is Poisson, above it
    arrivals come in bursts.
    """

    kind: Literal["gamma"]
    rate: LatencyModel
    burstiness: Annotated[float, Field(ge=0.01, le=100)]

    def times(self, rng: Random) -> Iterator[float]:
        shape = self.burstiness**-2
        return _apart(lambda: rng.gammavariate(shape, 1 / (self.rate * shape)))


class Constant(Strict):
    """One every ``1 / rate`` seconds, the first at 0."""

    kind: Literal["constant"]
    rate: LatencyModel

    def times(self, rng: Random) -> Iterator[float]:
        count = 0
        while True:
            yield count / self.rate
            count += 1


class TraceTimed(Strict):
    """When the requests of a trace arrive; ends with it. A relative path starts at the description's folder."""

    kind: Literal["trace"]
    trace: str
    _path: Path = PrivateAttr(default=Path())

    def model_post_init(self, context: Any) -> None:
        self._path = folder_of(context) / self.trace

    def times(self, rng: Random) -> Iterator[float]:
        return (request.arrival_time for request in read_trace(self._path))


Arrivals = Annotated[Poisson | Gamma | Constant | TraceTimed, Field(discriminator="kind")]
