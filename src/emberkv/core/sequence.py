"""A sequence: one request's tokens on their way through the scheduler."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from emberkv.core.hashing import Chain
from emberkv.core.loading import NOTHING_BELOW, Admission, LoadDecision, PendingLookup, Wait
from emberkv.core.prefix_cache import Lease


class FinishReason(Enum):
    STOP = "stop"  # an end-of-sequence token, or a stop string found by the caller
    LENGTH = "length"  # as many tokens as were asked for
    ABORT = "abort"  # the caller gave up
    ERROR = "error"  # the engine failed


class SequenceStatus(Enum):
    WAITING = "waiting"  # not admitted, or preempted
    LOADING = "loading"  # holds nothing, and waits for blocks from a lower tier, or for its answer to a look-up
    PREFILLING = "prefilling"  # holds a lease; tokens are left to compute before the next one can be sampled
    DECODING = "decoding"  # all but the last token are computed
    FINISHED = "finished"


BACKGROUND_PRIORITY = 1_000_000
"""From here on, nobody waits for a sequence: a step computes at most one chunk of it, and none beside another's."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the scheduler.

    chain: the prompt and what has been generated. num_computed: leading tokens that have KV state.

    waits: the loads it has waited for, or does. lookup: the only look-up that it has waited for, or does. promotion:
    what was decided last about lower tiers. admission: where the hit came from and why there was no more, set when
    first admitted. priority: lower is sooner; order: the scheduler's count of arrivals, which breaks ties. tenant:
    between tenants the scheduler shares fairly; short: whether, by the scheduler's estimate, a step is enough to
    compute what is not cached of it. wants_prompt_logits: the logits at each position of the prompt are wanted. Only
    computing gives logits, so the cache is not read; what is computed is cached all the same.
    """

    request_id: str
    chain: Chain
    max_new_tokens: int
    priority: int = 0
    tenant: str = ""
    order: int = 0
    wants_prompt_logits: bool = False
    short: bool = True
    status: SequenceStatus = SequenceStatus.WAITING
    lease: Lease | None = None
    num_computed: int = 0
    cached_tokens: int = 0  # of the prompt, when first admitted
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    waits: list[Wait] = field(default_factory=list)
    lookup: PendingLookup | None = None
    load_decision: LoadDecision = NOTHING_BELOW
    admission: Admission | None = None
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.chain)

    @property
    def num_generated(self) -> int:
        return len(self.chain) - self.prompt_tokens

    @property
    def tier_tokens(self) -> Mapping[str, int]:
        """Of the hit, what a load brought up, by tier."""
        return self.admission.tier_tokens if self.admission is not None else {}

    @property
    def held(self) -> Lease:
        """The lease of an admitted sequence."""
        assert self.lease is not None, f"{self.request_id} holds no lease"
        return self.lease

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts by who is served first."""
        return (self.priority, self.order)
