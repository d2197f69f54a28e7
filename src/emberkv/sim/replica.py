"""A simulated replica: the scheduler that serves, with a virtual clock in place of the engine.

Steps that only decode are taken together: until an answer ends, or something happens to the replica, or a block fills
whose commit others follow. Rows are the same as with single steps, since nothing else could have happened.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from emberkv.cluster.policies import ReplicaState
from emberkv.core.block_pool import BlockPool
from emberkv.core.loading import LatencyModel, Load
from emberkv.core.scheduler import Scheduler, StepPlan
from emberkv.core.sequence import Sequence as SchedulerSequence
from emberkv.core.stats import SchedulerStats
from emberkv.errors import RequestError
from emberkv.sim.outcome import RequestOutcome, Status, TurnKind, cache_event
from emberkv.sim.tiers import ModelledTiers, Transfer
from emberkv.sim.timing import NANOSECONDS, Step, StepClock
from emberkv.workload.request import ContentChain, Request

RATE_STEPS = 256.0
"""Steps after which a step's time counts half in a replica's measured rate."""

MEASURED_TOKENS = 2048
"""Prompt tokens whose expected time gives a replica's measured rate."""


@dataclass(slots=True, eq=False, init=False)
class SimulatedRequest:
    """One request from its arrival to its outcome, over all its attempts.

    arrival, first_token: nanoseconds. chain, sequence: those of the attempt that is under way, or comes next.
    ends_early: whether an end-of-sequence token comes before the limit; it takes a step of its own, as when serving.
    last_length: of the chain, in tokens, when its last sample is drawn. tenant: as the scheduler has it.
    queued_tokens: of its prompt, those that its replica is expected to compute yet.

    >>> from emberkv.workload.content import Content
    >>> lengths = {"prompt_tokens": 40, "output_tokens": 3, "max_output_tokens": 8}
    >>> request = Request(request_id="a", arrival_time=1.0, content=Content(), **lengths)
    >>> simulated = SimulatedRequest(request, 1_000_000_000, request.chain(bytes(32), block_size=16))
    >>> simulated.ends_early, simulated.last_length, simulated.attempt().max_new_tokens
    (True, 43, 8)
    """

    request: Request
    arrival: int
    chain: ContentChain
    tenant: str
    turn: TurnKind
    sequence: SchedulerSequence | None
    first_token: int | None
    prefilled_tokens: int
    replica: int | None
    retries: int
    queued_tokens: int
    max_new_tokens: int
    ends_early: bool
    last_length: int

    def __init__(self, request: Request, arrival: int, chain: ContentChain, tenant: str = "") -> None:
        self.request = request
        self.arrival = arrival
        self.chain = chain
        self.tenant = tenant
        self.turn = TurnKind.FIRST
        self.sequence = None
        self.first_token = None
        self.prefilled_tokens = 0
        self.replica = None
        self.retries = 0
        self.queued_tokens = 0
        output = request.output_tokens
        self.max_new_tokens = max(1, request.max_output_tokens)
        self.ends_early = output < self.max_new_tokens
        self.last_length = request.prompt_tokens + (output if self.ends_early else self.max_new_tokens - 1)

    def attempt(self) -> SchedulerSequence:
        """The sequence of the first attempt, or of another one after a replica was lost."""
        if self.sequence is not None:
            self.chain = self.request.chain(self.chain.root, self.chain.block_size)
        self.first_token = None
        self.sequence = SchedulerSequence(self.request.request_id, self.chain, self.max_new_tokens, tenant=self.tenant)
        return self.sequence

    def outcome(self, status: Status, completion: int | None = None) -> RequestOutcome:
        sequence = self.sequence
        if sequence is None:
            return RequestOutcome(
                self.request, status, self.arrival, turn=self.turn, replica=self.replica, retries=self.retries
            )
        admitted = status is Status.COMPLETED or sequence.lease is not None or sequence.num_preemptions > 0
        cached = sequence.cached_tokens
        return RequestOutcome(
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


@dataclass(slots=True)
class Replica:
    """One machine: the scheduler that serves, and a clock that says how long each of its steps takes.

    make_scheduler: makes a fresh scheduler, pool and cache each time that the replica starts. together: whether steps
    that only make sequences longer are taken together. lower: the tiers below its pool. followed: whether routers
    follow its pool, so that each of its blocks is to be committed on time.

    >>> from emberkv.sim.build import machine_of, scheduler_of
    >>> from emberkv.sim.config import SimulationConfig
    >>> config = SimulationConfig(kv_blocks=100)
    >>> machine = machine_of(config, block_size=16)
    >>> replica = Replica(0, lambda: scheduler_of(config, machine, None, 0), StepClock(machine.timer))
    >>> replica.in_flight, replica.used_blocks, replica.begin(now=0)
    (0, 0, None)
    """

    index: int
    make_scheduler: Callable[[], Scheduler]
    clock: StepClock
    together: bool = True
    lower: ModelledTiers | None = None
    followed: bool = False
    state: ReplicaState = field(default_factory=ReplicaState)
    step: Step | None = None
    computed_tokens: int = 0
    busy: int = 0
    scheduler: Scheduler = field(init=False)
    _requests: dict[str, SimulatedRequest] = field(default_factory=dict)
    _inbox: list[SimulatedRequest] = field(default_factory=list)
    _transfers: dict[Load, Transfer] = field(default_factory=dict)
    _arrived: list[Transfer] = field(default_factory=list)
    _past: list[SchedulerStats] = field(default_factory=list)
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
        """Blocks that requests hold."""
        return self.pool.num_blocks - self.pool.num_free

    @property
    def cached_blocks(self) -> int:
        """Blocks that are found under a block hash, held or not."""
        return self.pool.num_cached

    @property
    def tier_bytes(self) -> Mapping[str, int]:
        return {} if self.lower is None else {tier.name: tier.stored_bytes for tier in self.lower.tiers}

    @property
    def requests(self) -> list[SimulatedRequest]:
        return [*self._requests.values(), *self._inbox]

    @property
    def stats(self) -> list[SchedulerStats]:
        """The cache's counters, one object for each time that the replica has started."""
        return [*self._past, self.scheduler.stats]

    def submit(self, simulated: SimulatedRequest, cached_tokens: int = 0) -> None:
        """Take a request; the scheduler gets it when the step under way ends.

        cached_tokens: of its prompt, those that it is expected to find in the cache.
        """
        simulated.replica = self.index
        simulated.queued_tokens = max(1, simulated.request.prompt_tokens - cached_tokens)
        self.state.load += simulated.request.prompt_tokens
        self.state.queued_tokens += simulated.queued_tokens
        self._inbox.append(simulated)

    def add_arrivals(self) -> list[SimulatedRequest]:
        """Queue the submitted requests and account for loads that are over; called between steps.

        Returns the requests that can never be served.
        """
        if self._arrived:
            for transfer in self._arrived:
                self.scheduler.loaded(transfer.load, transfer.exact)
            self._arrived.clear()
        if not self._inbox:
            return []
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
            self._start_loads(self.lower, plan)
        if not plan:
            return None
        self.step = step = self._step_of(plan, now)
        self.busy += step.duration
        return step

    def interrupt(self, now: int) -> None:
        """Something happened: of steps taken together, those that have not begun by ``now`` are not taken."""
        step = self.step
        if step is not None and step.run is not None:
            count, duration = step.run.cut(now - step.began)
            self.busy += duration - step.duration
            step.count, step.duration = count, duration

    def end_step(self) -> list[SimulatedRequest]:
        """Account for the step under way. Returns the requests that are complete."""
        step = self.step
        assert step is not None
        self.step = None
        plan = step.plan
        steps = step.count - step.done
        if steps > 1:
            _grow(plan, steps - 1)
        ready = plan.decodes
        if plan.prefills:
            self._prefilled(step)
            ready = [*ready, *[chunk.sequence for chunk in plan.prefills if chunk.samples]]
        sampled: dict[str, int] = {}
        stopped: set[str] = set()
        for sequence in ready:
            request_id = sequence.request_id
            simulated = self._requests[request_id]
            if simulated.first_token is None:
                simulated.first_token = step.ends
            if simulated.ends_early and len(sequence.chain) == simulated.last_length:
                stopped.add(request_id)
            sampled[request_id] = 0  # chains know their own answers and take whatever token is given
        finished = self.scheduler.complete(plan, sampled, stopped, steps=steps)
        if self.lower is not None:
            self._offload(self.lower, step)
        return [self._drop(sequence.request_id) for sequence in finished]

    def take_new_transfers(self) -> list[Transfer]:
        """The loads from lower tiers that have begun since the last call."""
        if not self._transfers:
            return []
        begun = [transfer for transfer in self._transfers.values() if not transfer.scheduled]
        for transfer in begun:
            transfer.scheduled = True
        return begun

    def end_load(self, transfer: Transfer) -> bool:
        """A load is over; it is accounted for when the step under way ends. False if it was lost with the replica."""
        if self._transfers.pop(transfer.load, None) is None:
            return False
        self._arrived.append(transfer)
        return True

    def fail(self, now: int) -> list[SimulatedRequest]:
        """Lose all state. Returns the requests that were in flight, in the order in which they came."""
        self.interrupt(now)
        self._catch_up(now, begins=False)
        lost = [*self._requests.values(), *self._inbox]
        self._requests.clear()
        self._inbox.clear()
        self._transfers.clear()
        self._arrived.clear()
        if self.lower is not None:
            self.lower.clear()
        self._past.append(self.scheduler.stats)
        self.scheduler = self.make_scheduler()
        self.state.load = 0.0
        self.state.queued_tokens = 0.0
        self.state.up = False
        self.step = None
        return lost

    def stop(self, now: int) -> None:
        """The simulation ends, perhaps during a step; one that begins just now has begun."""
        self.interrupt(now + 1)
        self.catch_up(now)
        self.step = None

    def catch_up(self, now: int) -> None:
        """Account for those of steps taken together that have ended by ``now``; the next one has begun."""
        self._catch_up(now, begins=True)

    def _catch_up(self, now: int, *, begins: bool) -> None:
        """begins: whether a step begins where another one ends at ``now``."""
        step = self.step
        if step is not None and step.run is not None:
            count, duration = step.run.cut(now - step.began)
            under_way = duration > now - step.began
            self._advance(step, count - under_way, planned=under_way or begins)

    def _step_of(self, plan: StepPlan, now: int) -> Step:
        if plan.prefills:
            return Step(plan, now, self.clock.step(plan))
        decodes, count = len(plan.decodes), self._steps_together(plan)
        context = sum([len(sequence.chain) for sequence in plan.decodes])
        if count == 1:
            return Step(plan, now, self.clock.decode(decodes, context))
        run = self.clock.run(decodes, context, count)
        return Step(plan, now, run.duration, count, run)

    def _steps_together(self, plan: StepPlan) -> int:
        """How many times in a row ``plan`` is computed: until it would be another one, or an answer ends."""
        if not self.together:
            return 1
        requests = self._requests
        left = min([requests[each.request_id].last_length - len(each.chain) for each in plan.decodes])
        within_blocks = self.followed or self.lower is not None
        return self.scheduler.steady_steps(plan, 1 + left, within_blocks=within_blocks)

    def _advance(self, step: Step, done: int, *, planned: bool = True) -> None:
        """Account for the first ``done`` of steps taken together, as far as it was not done before."""
        steps = done - step.done
        if steps > 0:
            _grow(step.plan, steps)
            self.scheduler.advance(step.plan, steps, planned=planned)
            step.done = done

    def _dequeue(self, simulated: SimulatedRequest, tokens: int) -> None:
        """``tokens`` of a request's prompt wait no longer."""
        tokens = min(tokens, simulated.queued_tokens)
        simulated.queued_tokens -= tokens
        self.state.queued_tokens -= tokens

    def _prefilled(self, step: Step) -> None:
        """Count what a step computed of prompts, and record how fast it was."""
        computed = 0
        for chunk in step.plan.prefills:
            simulated = self._requests[chunk.sequence.request_id]
            tokens = chunk.stop - chunk.start
            computed += tokens
            simulated.prefilled_tokens += tokens
            self._dequeue(simulated, simulated.queued_tokens if chunk.samples else tokens)
        self.computed_tokens += computed
        if computed:
            self._prefill.observe(computed, step.duration / NANOSECONDS)
            seconds = self._prefill.seconds_for(MEASURED_TOKENS)
            self.state.prefill_rate = MEASURED_TOKENS / seconds if seconds else None

    def _start_loads(self, lower: ModelledTiers, plan: StepPlan) -> None:
        """Begin the plan's loads, and mark in the tiers what is in use above them."""
        for load in plan.loads:
            self._transfers[load] = lower.onboard(load)
        for sequence in plan.admitted:
            lower.touch(sequence.chain.block_hashes[: sequence.held.hit_tokens // self.pool.block_size])

    def _offload(self, lower: ModelledTiers, step: Step) -> None:
        """Offload what the step committed, and record how fast prompts are computed."""
        lower.now = step.ends
        computed = sum(chunk.stop - chunk.start for chunk in step.plan.prefills)
        if computed:
            lower.prefilled(computed, step.duration)
        for block in self.pool.take_committed():
            if block.block_hash is not None:
                lower.offload(block.block_hash, block.exact)

    def _drop(self, request_id: str) -> SimulatedRequest:
        simulated = self._requests.pop(request_id)
        self.state.load -= simulated.request.prompt_tokens
        return simulated


def _grow(plan: StepPlan, steps: int) -> None:
    """Let each decoding sequence have the tokens that ``steps`` steps append."""
    for sequence in plan.decodes:
        assert isinstance(sequence.chain, ContentChain)
        sequence.chain.grow(steps)


MOST_SAMPLES = 512


@dataclass(slots=True)
class ReplicaSeries:
    """One replica's values over time, one for each sample. computed_tokens: prefilled since the start.

    used_blocks: those that requests hold.

    >>> series = ReplicaSeries()
    >>> series.used_blocks.append(7)
    >>> [len(column) for column in series.columns]
    [0, 0, 1, 0]
    """

    in_flight: "array[int]" = field(default_factory=lambda: array("q"))
    computed_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    used_blocks: "array[int]" = field(default_factory=lambda: array("q"))
    cached_blocks: "array[int]" = field(default_factory=lambda: array("q"))
    tier_bytes: dict[str, "array[int]"] = field(default_factory=dict)

    @property
    def columns(self) -> list["array[int]"]:
        return [self.in_flight, self.computed_tokens, self.used_blocks, self.cached_blocks, *self.tier_bytes.values()]


@dataclass(slots=True)
class Series:
    """How full and how busy the replicas are, sampled over virtual time in bounded memory.

    Samples are taken at multiples of an interval, in nanoseconds, that doubles whenever there are `MOST_SAMPLES`.
    next_time: of the next sample.

    >>> series = Series(replicas=[])
    >>> series.until(NANOSECONDS // 32, [])
    >>> series.seconds
    [0.0, 0.015625]
    """

    replicas: list[ReplicaSeries]
    interval: int = NANOSECONDS // 64
    times: "array[int]" = field(default_factory=lambda: array("q"))
    next_time: int = 0

    @property
    def seconds(self) -> list[float]:
        return [time / NANOSECONDS for time in self.times]

    def until(self, now: int, replicas: Sequence[Replica]) -> None:
        """Take the samples due before ``now``: nothing has changed since the last event."""
        while self.next_time < now:
            self.times.append(self.next_time)
            for series, replica in zip(self.replicas, replicas, strict=True):
                replica.catch_up(self.next_time)
                _sample(series, replica)
            self.next_time += self.interval
            if len(self.times) == MOST_SAMPLES:
                self._thin_out()

    def _thin_out(self) -> None:
        self.interval *= 2
        self.next_time = self.times[-2] + self.interval
        for column in (self.times, *(column for each in self.replicas for column in each.columns)):
            del column[1::2]


def _sample(series: ReplicaSeries, replica: Replica) -> None:
    series.in_flight.append(replica.in_flight)
    series.computed_tokens.append(replica.computed_tokens)
    series.used_blocks.append(replica.used_blocks)
    series.cached_blocks.append(replica.cached_blocks)
    for name, held in replica.tier_bytes.items():
        series.tier_bytes.setdefault(name, array("q")).append(held)
