"""What one step computes, as the scheduler hands it to whoever computes, or simulates, it."""

from dataclasses import dataclass, field

from emberkv.core.promotion import Load
from emberkv.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """prefill_chunk: most tokens of one prefill pass; a multiple of the cache's alignment.
    max_step_tokens: budget of one step, a decoding sequence costing one. max_running: admitted sequences.
    """

    prefill_chunk: int
    max_step_tokens: int = 256
    max_running: int = 64


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute tokens ``[start, stop)`` of a sequence over the KV state of all before them."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the chunk's last position yields the sequence's next token."""
        return self.stop == len(self.sequence.chain)


@dataclass(slots=True)
class StepPlan:
    """decodes: one forward pass together. prefills: one pass each, in order, after it.

    loads: what the driver is to bring up from lower tiers from now on, while it computes this and later plans.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[PrefillChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.stop - chunk.start for chunk in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
