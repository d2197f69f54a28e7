"""What one step computes: the scheduler's output, which an engine or a simulator executes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from emberkv.core.block import BlockCopy
from emberkv.core.loading import Load, PendingLookup
from emberkv.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """prefill_chunk: most tokens of one prefill pass; a multiple of the cache's alignment.
    max_step_tokens: budget of one step, a decoding sequence costing one. max_running: admitted sequences.
    weights: the parts in which tenants share the engine while it is busy; 1 for a tenant that is not among them.
    separate_long_prompts: prompts that take more than one step do not hold up a tenant's shorter ones. Without it a
    tenant's requests are admitted first come, first served, as other engines do.
    """

    prefill_chunk: int
    max_step_tokens: int = 256
    max_running: int = 64
    weights: Mapping[str, float] = field(default_factory=dict)
    separate_long_prompts: bool = True


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute tokens ``[start, stop)`` of a sequence over the KV state of all before them.

    copy: where the state of the tokens before ``start``, in the block that has both, is to be copied from first.
    """

    sequence: Sequence
    start: int
    stop: int
    copy: BlockCopy | None = None

    @property
    def samples(self) -> bool:
        """Whether the chunk's last position yields the sequence's next token."""
        return self.stop == len(self.sequence.chain)


@dataclass(slots=True)
class StepPlan:
    """What the engine computes next. `copies` come before everything else.

    decodes: each sequence's latest token, in one forward pass. prefills: in order, the chunks of one sequence side by
    side; in the same pass where the engine is batch-invariant, and in one pass each after it elsewhere.
    loads: what the driver is to bring up from lower tiers from now on, while it computes this and later plans.
    lookups: what the driver is to find out from lower tiers meanwhile.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[PrefillChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    lookups: list[PendingLookup] = field(default_factory=list)

    @property
    def copies(self) -> list[BlockCopy]:
        """Blocks to copy. No target is a source, and none is read or written by anything else in the step before."""
        return [chunk.copy for chunk in self.prefills if chunk.copy is not None]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.stop - chunk.start for chunk in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
