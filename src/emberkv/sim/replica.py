"""A simulated replica: the scheduler that serves, with a virtual clock in place of the engine.

Steps that only decode and change nothing but lengths are taken together: until a block fills, an answer ends, or
something happens to the replica. Rows are the same as with single steps, since nothing else could have happened.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from emberkv.cluster.policies import ReplicaState
from emberkv.core.block_pool import BlockPool
from emberkv.core.loading import LatencyModel, Load
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.stats import CacheStats
from emberkv.errors import RequestError
from emberkv.sim.simulated_request import SimulatedRequest
from emberkv.sim.tiers import LowerModel, Transfer
from emberkv.sim.timing import ANY_TOKEN, NANOSECONDS, Step, StepClock
from emberkv.workload.chain import ContentChain

RATE_STEPS = 256.0
"""Steps after which a step's time counts half in a replica's measured rate."""

MEASURED_TOKENS = 2048
"""Prompt tokens whose expected time gives a replica's measured rate."""


@dataclass(slots=True)
class Replica:
    """One machine. make_scheduler: a fresh scheduler, pool and cache, for each time that it starts.

    together: whether steps that only make sequences longer are taken together. lower: what its scheduler looks into.
    """

    index: int
    make_scheduler: Callable[[], Scheduler]
    clock: StepClock
    together: bool = True
    lower: LowerModel | None = None
    state: ReplicaState = field(default_factory=ReplicaState)
    step: Step | None = None
    computed_tokens: int = 0
    busy: int = 0
    scheduler: Scheduler = field(init=False)
    _requests: dict[str, SimulatedRequest] = field(default_factory=dict)
    _inbox: list[SimulatedRequest] = field(default_factory=list)
    _transfers: dict[Load, Transfer] = field(default_factory=dict)
    _arrived: list[Transfer] = field(default_factory=list)
    _past: list[CacheStats] = field(default_factory=list)
    _prefill: LatencyModel = field(default_factory=lambda: LatencyModel(half_life=RATE_STEPS))

    def __post_init__(self) -> None:
        self.scheduler = self.make_scheduler()

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.cache.pool

    @property
    def in_flight(self) -> int:
        return len(self._requests) + len(self._inbox)

    @property
    def used_blocks(self) -> int:
        """Held by requests."""
        return self.pool.num_blocks - self.pool.num_free

    @property
    def cached_blocks(self) -> int:
        """Found under a block hash, held or not."""
        return self.pool.num_cached

    @property
    def tier_bytes(self) -> Mapping[str, int]:
        return {} if self.lower is None else {tier.name: tier.stored_bytes for tier in self.lower.tiers}

    @property
    def requests(self) -> list[SimulatedRequest]:
        return [*self._requests.values(), *self._inbox]

    @property
    def stats(self) -> list[CacheStats]:
        """One for each time that it has started."""
        return [*self._past, self.scheduler.stats]

    def submit(self, simulated: SimulatedRequest, cached_tokens: int = 0) -> None:
        """Take a request; it is looked at when the step under way ends. cached_tokens: what it is expected to find."""
        simulated.replica = self.index
        simulated.queued_tokens = max(1, simulated.request.prompt_tokens - cached_tokens)
        self.state.load += simulated.request.prompt_tokens
        self.state.queued_tokens += simulated.queued_tokens
        self._inbox.append(simulated)

    def take_in(self) -> list[SimulatedRequest]:
        """Queue who has been submitted, and account for loads that are over; between steps.

        Returns who can never be served.
        """
        for transfer in self._arrived:
            self.scheduler.loaded(transfer.load, transfer.exact)
        self._arrived.clear()
        rejected = []
        for simulated in self._inbox:
            try:
                self.scheduler.add(simulated.attempt())
            except RequestError:
                self.state.load -= simulated.request.prompt_tokens
                self._dequeue(simulated, simulated.queued_tokens)
                rejected.append(simulated)
            else:
                self._requests[simulated.request.request_id] = simulated
        self._inbox.clear()
        return rejected

    def begin(self, now: int) -> Step | None:
        """Begin the next step, if there is anything to do; none is under way."""
        if self.lower is not None:
            self.lower.now = now
        plan = self.scheduler.schedule()
        if self.lower is not None:
            self._look_down(self.lower, plan)
        if not plan:
            return None
        self.step = step = self._step_of(plan, now)
        self.busy += step.duration
        return step

    def interrupt(self, now: int) -> None:
        """Something happened: of steps taken together, those that have not begun yet are not taken."""
        step = self.step
        if step is not None and step.run is not None:
            count, duration = step.run.cut(now - step.began)
            self.busy += duration - step.duration
            step.count, step.duration = count, duration

    def end_step(self) -> list[SimulatedRequest]:
        """Account for the step under way. Returns who is done, with their answers."""
        step = self.step
        assert step is not None
        self.step = None
        plan = step.plan
        self._grow(plan, step.count - 1)
        for chunk in plan.prefills:
            simulated = self._requests[chunk.sequence.request_id]
            tokens = chunk.stop - chunk.start
            simulated.prefilled_tokens += tokens
            self.computed_tokens += tokens
            self._dequeue(simulated, simulated.queued_tokens if chunk.samples else tokens)
        self._measure(step)
        ready = [*plan.decodes, *(chunk.sequence for chunk in plan.prefills if chunk.samples)]
        stopped = set()
        for sequence in ready:
            simulated = self._requests[sequence.request_id]
            if simulated.first_token is None:
                simulated.first_token = step.ends
            if simulated.ends_early and len(sequence.chain) == simulated.last_length:
                stopped.add(sequence.request_id)
        finished = self.scheduler.complete(plan, ANY_TOKEN, stopped)
        if self.lower is not None:
            self._copy_down(self.lower, step)
        return [self._drop(sequence.request_id) for sequence in finished]

    def take_begun(self) -> list[Transfer]:
        """The loads from lower tiers that have begun since the last call."""
        begun = [transfer for transfer in self._transfers.values() if not transfer.scheduled]
        for transfer in begun:
            transfer.scheduled = True
        return begun

    def end_load(self, transfer: Transfer) -> bool:
        """A load is over; it is looked at when the step under way ends. False if it was lost with the replica."""
        if self._transfers.pop(transfer.load, None) is None:
            return False
        self._arrived.append(transfer)
        return True

    def fail(self, now: int) -> list[SimulatedRequest]:
        """Lose everything. Returns the requests that were in flight, in the order in which they came."""
        self.settle(now)
        lost = [*self._requests.values(), *self._inbox]
        self._requests.clear()
        self._inbox.clear()
        self._transfers.clear()
        self._arrived.clear()
        if self.lower is not None:
            self.lower.lost()
        self._past.append(self.scheduler.stats)
        self.scheduler = self.make_scheduler()
        self.state.load = self.state.queued_tokens = 0
        self.state.up = False
        self.step = None
        return lost

    def settle(self, now: int) -> None:
        """It all ends during a step: account for those of several that have ended."""
        step = self.step
        if step is not None and step.run is not None:
            count, duration = step.run.cut(now - step.began)
            self._grow(step.plan, count - (duration > now - step.began))
            self.step = None

    def _step_of(self, plan: StepPlan, now: int) -> Step:
        if plan.prefills:
            return Step(plan, now, self.clock.step(plan))
        count = self._steady_steps(plan)
        if count == 1:
            return Step(plan, now, self.clock.step(plan))
        context = sum(len(sequence.chain) for sequence in plan.decodes)
        run = self.clock.run(len(plan.decodes), context, count)
        return Step(plan, now, run.duration, count, run)

    def _steady_steps(self, plan: StepPlan) -> int:
        """How many times in a row ``plan`` would be planned again: until a block is full or an answer ends."""
        if not self.together or plan.admitted or plan.preempted or self.scheduler.holds_back:
            return 1
        size = self.pool.block_size
        more = size
        for sequence in plan.decodes:
            length = len(sequence.chain)
            left = self._requests[sequence.request_id].last_length - length
            more = min(more, -length % size, left)
            if not more:
                break
        return 1 + more

    def _grow(self, plan: StepPlan, steps: int) -> None:
        """Account for decode steps that only make sequences longer, within the blocks that they hold."""
        if not steps:
            return
        for sequence in plan.decodes:
            assert isinstance(sequence.chain, ContentChain)
            sequence.num_computed += steps
            sequence.chain.grow(steps)
        self.scheduler.count_decodes(plan, steps)

    def _dequeue(self, simulated: SimulatedRequest, tokens: int) -> None:
        """So many of a request's tokens wait no longer."""
        tokens = min(tokens, simulated.queued_tokens)
        simulated.queued_tokens -= tokens
        self.state.queued_tokens -= tokens

    def _measure(self, step: Step) -> None:
        """Learn from a step how fast prompts are computed."""
        computed = sum(chunk.stop - chunk.start for chunk in step.plan.prefills)
        if computed:
            self._prefill.observe(computed, step.duration / NANOSECONDS)
            seconds = self._prefill.seconds_for(MEASURED_TOKENS)
            self.state.prefill_rate = MEASURED_TOKENS / seconds if seconds else None

    def _look_down(self, lower: LowerModel, plan: StepPlan) -> None:
        """Begin the plan's loads, and keep recent below what is in use above."""
        for load in plan.loads:
            self._transfers[load] = lower.begin(load)
        for sequence in plan.admitted:
            lower.touch(sequence.chain.block_hashes[: sequence.held.hit_tokens // self.pool.block_size])

    def _copy_down(self, lower: LowerModel, step: Step) -> None:
        """Offer what has been committed to the tiers below, and learn how fast prompts are computed."""
        lower.now = step.ends
        computed = sum(chunk.stop - chunk.start for chunk in step.plan.prefills)
        if computed:
            lower.prefilled(computed, step.duration)
        for block in self.pool.take_committed():
            if block.block_hash is not None:
                lower.offer(block.block_hash, block.exact)

    def _drop(self, request_id: str) -> SimulatedRequest:
        simulated = self._requests.pop(request_id)
        self.state.load -= simulated.request.prompt_tokens
        return simulated
