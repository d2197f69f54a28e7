"""A sequence: one request's tokens on their way through the scheduler; and what one step computes of sequences."""

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain as joined
from operator import attrgetter
from typing import NamedTuple

from emberkv.core.block import BlockCopy, Match, MatchEnd
from emberkv.core.hashing import Chain
from emberkv.core.loading import NOTHING_BELOW, Admission, Load, LoadDecision, LoadWait, PendingLookup
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
"""From this priority on, a sequence runs in the background: a step computes at most one chunk of it, and none beside
another sequence's."""


@dataclass(slots=True, eq=False, init=False)
class Sequence:
    """One request's state in the scheduler: its tokens, its blocks, and how far they are computed.

    chain: the prompt and the tokens generated so far. num_computed: leading tokens that have KV state.
    lease: the blocks that the sequence holds while it is admitted.
    priority: lower is served sooner. order: the scheduler's count of arrivals, which breaks ties.
    tenant: the scheduler shares the engine fairly between tenants.
    short: whether, by the scheduler's estimate, one step is enough to compute what is not cached of it.
    wants_prompt_logits: the logits at each position of the prompt are wanted. Only computing gives logits, so the cache
    is not read; what is computed is cached all the same.
    checkpoints: where hits end at checkpoints, the numbers of tokens behind which one is wanted.
    waits: the loads for which the sequence has waited or waits. lookup: likewise, its only look-up.
    load_decision: the latest decision about blocks of lower tiers.
    admission: where the hit came from and why there was no more, set at the first admission.
    """

    request_id: str
    chain: Chain
    max_new_tokens: int
    priority: int
    tenant: str
    order: int
    wants_prompt_logits: bool
    checkpoints: tuple[int, ...]
    short: bool
    status: SequenceStatus
    lease: Lease | None
    num_computed: int
    cached_tokens: int  # of the prompt, when first admitted
    num_preemptions: int
    finish_reason: FinishReason | None
    waits: list[LoadWait]
    lookup: PendingLookup | None
    load_decision: LoadDecision
    admission: Admission | None
    prompt_tokens: int

    def __init__(
        self,
        request_id: str,
        chain: Chain,
        max_new_tokens: int,
        priority: int = 0,
        tenant: str = "",
        *,
        wants_prompt_logits: bool = False,
        checkpoints: tuple[int, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.chain = chain
        self.max_new_tokens = max_new_tokens
        self.priority = priority
        self.tenant = tenant
        self.order = 0
        self.wants_prompt_logits = wants_prompt_logits
        self.checkpoints = checkpoints
        self.short = True
        self.status = SequenceStatus.WAITING
        self.lease = None
        self.num_computed = 0
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.finish_reason = None
        self.waits = []
        self.lookup = None
        self.load_decision = NOTHING_BELOW
        self.admission = None
        self.prompt_tokens = len(chain)

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
        """The sort key by which sequences are served."""
        return (self.priority, self.order)


def is_being_computed(sequence: Sequence, match: Match, prefilling: list[Sequence]) -> bool:
    """Whether the prefill of one of ``prefilling`` is about to compute the first block that ``sequence`` lacks.

    match: what of ``sequence`` is cached.
    """
    block, block_hashes = len(match.blocks), sequence.chain.block_hashes
    if match.end is MatchEnd.OFF or block >= len(block_hashes):
        return False
    for each in prefilling:
        if each.priority > sequence.priority:
            continue
        others = each.chain.block_hashes
        if each.held.num_committed <= block < len(others) and others[block] == block_hashes[block]:
            return True
    return False


def advance_leases(sequences: list[Sequence], steps: int, block_size: int, *, planned: bool) -> None:
    """Commit and allocate what ``steps`` decode steps of ``sequences`` fill and need, in the order of single steps.

    Each step commits the blocks that it fills, and the next one allocates those that follow them.
    planned: whether the step that follows the last one has allocated, too.
    """
    filling: dict[int, list[tuple[Lease, int]]] = {}  # by step: leases, and the tokens that they then have
    for sequence in sequences:
        computed = sequence.num_computed
        first = block_size - computed % block_size
        if first <= steps:
            for step in range(first, steps + 1, block_size):
                filling.setdefault(step, []).append((sequence.held, computed + step))
    for step in sorted(filling):
        for lease, tokens in filling[step]:
            lease.commit_decoded(tokens)
        if planned or step < steps:
            for lease, tokens in filling[step]:
                lease.extend(tokens + 1)
    for sequence in sequences:
        sequence.num_computed += steps
        sequence.held.commit_decoded(sequence.num_computed)


_BY_RANK = attrgetter("priority", "order")
"""`Sequence.rank`, without a call in Python."""


class RunningSequences:
    """The admitted sequences, by what a step computes of them.

    decoding: a token each; in the order of `Sequence.rank`. prefilling: prompt tokens, all of which may be planned
    already; in the order of admission.
    """

    __slots__ = ("decoding", "prefilling")

    def __init__(self) -> None:
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def __iter__(self) -> Iterator[Sequence]:
        return joined(self.decoding, self.prefilling)

    def admit(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.PREFILLING
        self.prefilling.append(sequence)

    def begin_decoding(self, sequence: Sequence) -> None:
        """The token behind the prompt of ``sequence`` is sampled."""
        self.prefilling.remove(sequence)
        sequence.status = SequenceStatus.DECODING
        insort(self.decoding, sequence, key=_BY_RANK)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError for a sequence that is not running."""
        (self.decoding if sequence.status is SequenceStatus.DECODING else self.prefilling).remove(sequence)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """prefill_chunk: most tokens of one prefill pass; a multiple of the cache's alignment, or a divisor of it where the
    engine is batch-invariant.
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


class PrefillChunk(NamedTuple):
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


@dataclass(slots=True, init=False)
class StepPlan:
    """What the engine computes next. `copies` come before everything else.

    decodes: each sequence's latest token, in one forward pass. prefills: in order, the chunks of one sequence side by
    side; in the same pass where the engine is batch-invariant, and in one pass each after it elsewhere.
    loads: what the driver is to bring up from lower tiers from now on, while it computes this and later plans.
    lookups: what the driver is to find out from lower tiers meanwhile.
    """

    decodes: list[Sequence]
    prefills: list[PrefillChunk]
    admitted: list[Sequence]
    preempted: list[Sequence]
    loads: list[Load]
    lookups: list[PendingLookup]

    def __init__(self) -> None:
        self.decodes = []
        self.prefills = []
        self.admitted = []
        self.preempted = []
        self.loads = []
        self.lookups = []

    @property
    def copies(self) -> list[BlockCopy]:
        """Blocks to copy. No target is a source, and none is read or written by anything else in the step before."""
        return [chunk.copy for chunk in self.prefills if chunk.copy is not None]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.stop - chunk.start for chunk in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
