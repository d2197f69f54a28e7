"""A step that a replica is computing, or several in a row."""

from collections.abc import Mapping
from dataclasses import dataclass

from emberkv.core.scheduler import StepPlan
from emberkv.sim.timing import SteadyRun


class _AnyToken(dict[str, int]):
    """Sampled tokens: chains know their own answers and take whatever is given."""

    def __missing__(self, request_id: str) -> int:
        return 0


ANY_TOKEN: Mapping[str, int] = _AnyToken()


@dataclass(slots=True)
class Step:
    """Under way from ``began`` for ``duration`` nanoseconds; ``count`` of them in a row, which ``run`` then tells."""

    plan: StepPlan
    began: int
    duration: int
    count: int = 1
    run: SteadyRun | None = None

    @property
    def ends(self) -> int:
        return self.began + self.duration
