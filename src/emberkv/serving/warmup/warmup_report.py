"""How a warmup stands, for /ready, the log and metrics."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class WarmupPhase(Enum):
    WAITING = "waiting"  # the model is not loaded yet
    OFF = "off"
    RUNNING = "running"  # the first pass over all prompts
    DONE = "done"  # it has warmed them all
    TIMED_OUT = "timed_out"  # it has not, for lack of time
    FAILED = "failed"  # it has not, for another reason


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """``phase`` is the first pass's; all else is of now.

    prompts: pinned ones, and those that could not become one. tokens: of the pinned ones, those that were cached when
    last looked at. problems: why prompts are not warm. learned, restored: prompts that an earlier run has written down,
    and those of them that the first pass has made warm. computed_tokens, seconds, timeouts: totals since the start.
    """

    phase: WarmupPhase
    required: bool = False
    prompts: int = 0
    warm_prompts: int = 0
    tokens: int = 0
    problems: tuple[str, ...] = ()
    learned: int = 0
    restored: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    timeouts: int = 0

    @property
    def is_warm(self) -> bool:
        return self.warm_prompts == self.prompts

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "phase": self.phase.value, "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        text = (
            f"{self.phase.value.replace('_', ' ')}: {self.warm_prompts} of {self.prompts} prompts warm, "
            f"{self.tokens:,} tokens, {self.seconds:.1f} s"
        )
        return f"{text}; {self.restored} of {self.learned} learned prompts restored" if self.learned else text
