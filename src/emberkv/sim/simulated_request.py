"""A request on its way through the simulation, and what the simulation remembers of each session."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from emberkv.core.hashing import BlockHash
from emberkv.core.sequence import Sequence as SchedulerSequence
from emberkv.sim.outcome import Outcome, Status, Turn, cache_event
from emberkv.workload.chain import ContentChain
from emberkv.workload.request import Request


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request from its arrival to its outcome, over all its attempts.

    arrival, first_token: nanoseconds. chain, sequence: those of the attempt that is under way, or comes next.
    ends_early: whether an end-of-sequence token comes before the limit; it takes a step of its own, as when serving.
    last_length: of the chain, in tokens, when its last sample is drawn. tenant: as the scheduler has it.
    queued_tokens: of its prompt, those that its replica is expected to compute yet.
    """

    request: Request
    arrival: int
    chain: ContentChain
    turn: Turn = Turn.FIRST
    sequence: SchedulerSequence | None = None
    first_token: int | None = None
    prefilled_tokens: int = 0
    replica: int | None = None
    retries: int = 0
    tenant: str = ""
    queued_tokens: int = 0

    max_new_tokens: int = field(init=False)
    ends_early: bool = field(init=False)
    last_length: int = field(init=False)

    def __post_init__(self) -> None:
        prompt, output = self.request.prompt_tokens, self.request.output_tokens
        self.max_new_tokens = max(1, self.request.max_output_tokens)
        self.ends_early = output < self.max_new_tokens
        self.last_length = prompt + (output if self.ends_early else self.max_new_tokens - 1)

    def attempt(self) -> SchedulerSequence:
        """Begin, or begin anew."""
        if self.sequence is not None:
            self.chain = self.request.chain(self.chain.root, self.chain.block_size)
        self.first_token = None
        self.sequence = SchedulerSequence(self.request.request_id, self.chain, self.max_new_tokens, tenant=self.tenant)
        return self.sequence

    def outcome(self, status: Status, completion: int | None = None) -> Outcome:
        sequence = self.sequence
        if sequence is None:
            return Outcome(
                self.request, status, self.arrival, turn=self.turn, replica=self.replica, retries=self.retries
            )
        admitted = status is Status.COMPLETED or sequence.lease is not None or sequence.num_preemptions > 0
        cached = sequence.cached_tokens
        return Outcome(
            request=self.request,
            status=status,
            arrival=self.arrival,
            first_token=self.first_token,
            completion=completion,
            output_tokens=sequence.num_generated,
            turn=self.turn,
            event=cache_event(self.turn, self.request.prompt_tokens, cached) if admitted else None,
            cached_tokens=cached,
            prefilled_tokens=self.prefilled_tokens,
            tier_tokens=sequence.tier_tokens,
            replica=self.replica,
            preemptions=sequence.num_preemptions,
            retries=self.retries,
        )


@dataclass(frozen=True, slots=True)
class _Left:
    """What a session's last completed turn left: its length, and its last full block."""

    tokens: int
    blocks: int
    block_hash: BlockHash


@dataclass(slots=True)
class Sessions:
    """What each session's last turn left, to tell a turn that does not go on from it. About 200 bytes a session."""

    _left: dict[str, _Left | None] = field(default_factory=dict)

    def turn_of(self, request: Request, blocks: Sequence[BlockHash]) -> Turn:
        """To be called once for each request, when it arrives. blocks: the hashes of its prompt's full blocks."""
        session = request.session_id
        if not session:
            return Turn.FIRST
        if session not in self._left:
            self._left[session] = None
            return Turn.FIRST
        left = self._left[session]
        if left is None:
            return Turn.CONTINUES
        goes_on = request.prompt_tokens > left.tokens and (
            not left.blocks or blocks[left.blocks - 1] == left.block_hash
        )
        return Turn.CONTINUES if goes_on else Turn.UNEXPECTED

    def completed(self, request: Request, blocks: Sequence[BlockHash], tokens: int) -> None:
        """The turn is over. blocks: the hashes of the full blocks of prompt and answer, which are so many tokens."""
        if request.session_id:
            self._left[request.session_id] = _Left(tokens, len(blocks), blocks[-1] if blocks else b"")
