"""The event loop of a simulation: requests arrive, replicas compute, virtual time goes from event to event."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from heapq import heappop, heappush
from itertools import cycle
from random import Random
from typing import Final

from emberkv.cluster.feed import RoutedReplicas
from emberkv.cluster.routing import Router, RoutingRequest
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError
from emberkv.sim.outcome import RequestOutcome, Sessions, Status
from emberkv.sim.replica import Replica, ReplicaSeries, Series, SimulatedRequest
from emberkv.sim.tiers import Transfer
from emberkv.sim.timing import NANOSECONDS, Step, nanoseconds
from emberkv.workload.bounds import MOST_SECONDS
from emberkv.workload.request import ContentChain, Request
from emberkv.workload.source import Source

Action = Callable[[], None]

_LAST_NANOSECOND: Final = round(MOST_SECONDS * 1e9)


class EventKind(IntEnum):
    """The kinds of events, in their order at equal times. New steps begin after all events of a time."""

    STEP_ENDS = 0
    LOAD_ENDS = 1
    FAILURE = 2
    RESTART = 3
    ARRIVAL = 4


@dataclass(slots=True)
class EventQueue:
    """Actions in order of time (nanoseconds), then kind, then rank, then as they were added.

    >>> events = EventQueue()
    >>> events.add(20, EventKind.ARRIVAL, lambda: print("arrives"))
    >>> events.add(20, EventKind.STEP_ENDS, lambda: print("ends"))
    >>> events.run_next()
    ends
    arrives
    >>> events.next_time is None
    True
    """

    _heap: list[tuple[int, EventKind, int, int, Action]] = field(default_factory=list)
    _added: int = 0

    @property
    def next_time(self) -> int | None:
        """None when nothing more happens."""
        return self._heap[0][0] if self._heap else None

    def add(self, time: int, kind: EventKind, action: Action, *, rank: int = 0) -> None:
        """Raises ConfigError for a time beyond the virtual clock's."""
        if time > _LAST_NANOSECOND:
            raise ConfigError(f"the simulation comes to {time / 1e9:g} s; it has room for {MOST_SECONDS:g} s")
        self._added += 1
        heappush(self._heap, (time, kind, rank, self._added, action))

    def run_next(self) -> None:
        """Take all actions of the next time, with those that are added for it meanwhile."""
        heap, now = self._heap, self._heap[0][0]
        while heap and heap[0][0] == now:
            heappop(heap)[-1]()


@dataclass(frozen=True, slots=True)
class Outage:
    """The loss of a replica; times are seconds of virtual time. down_for: None for good.

    >>> planned = [Outage(0, at=9.0), Outage(1, at=5.0, down_for=2.0), Outage(1, at=1.0, down_for=2.0)]
    >>> [[outage.at for outage in each] for each in outages(planned, None, replicas=2, rng=Random(0))]
    [[9.0], [1.0, 5.0]]
    """

    replica: int
    at: float
    down_for: float | None = None


@dataclass(frozen=True, slots=True)
class RandomOutages:
    """Exponentially distributed times, of each replica's own, between its start and its loss, and until it is back.

    mean_time_up, mean_time_down: seconds.

    >>> drawn = RandomOutages(mean_time_up=100.0, mean_time_down=1.0).of(replica=3, rng=Random(0))
    >>> first, second = next(drawn), next(drawn)
    >>> first.replica, first.at + first.down_for < second.at
    (3, True)
    """

    mean_time_up: float
    mean_time_down: float

    def of(self, replica: int, rng: Random) -> Iterator[Outage]:
        """The outages of one replica, in order, without end."""
        now = 0.0
        while True:
            now += rng.expovariate(1 / self.mean_time_up)
            down = rng.expovariate(1 / self.mean_time_down)
            yield Outage(replica, now, down)
            now += down


def outages(
    planned: Sequence[Outage], drawn: RandomOutages | None, replicas: int, rng: Random
) -> list[Iterator[Outage]]:
    """For each replica its outages in order of time; the next one is asked for when the one before is over."""
    found: list[Iterator[Outage]] = []
    for replica in range(replicas):
        own = sorted((each for each in planned if each.replica == replica), key=lambda each: each.at)
        if own:
            found.append(iter(own))
        if drawn is not None:
            found.append(drawn.of(replica, Random(rng.random())))
    return found


Progress = Callable[[int, float], None]
"""Called now and then with the number of requests that have ended, and the virtual time in seconds."""

RootOf = Callable[[Request], BlockHash]
"""The parent hash of a request's first block; requests of different roots share nothing."""

PROGRESS_EVERY = 100


@dataclass(frozen=True, slots=True)
class SimulationEnd:
    """How a simulation ended: at how many virtual seconds, and whether by the user's interrupt.

    >>> SimulationEnd(12.5, interrupted=False).at
    12.5
    """

    at: float
    interrupted: bool


class Simulator:
    """Drives replicas with the requests of a source; every request has one outcome in the end.

    routers: one of each gateway. Requests go to the gateways in turn, as behind a load balancer; each gateway knows of
    every replica's blocks and load at once, and of its own decisions alone.
    root_of, block_size: of the requests' chains. emit: takes each outcome as it comes. outages: of each replica, or
    several of one, in order. max_retries: how many lost replicas a request survives. request_seconds,
    request_token_seconds: from a request's arrival until a replica can have it, and for each token of its prompt.
    stop_at: virtual seconds; requests in flight then are unfinished. tenants: whether each client is a tenant, so that
    schedulers share their replica fairly between clients.

    >>> from emberkv.sim.build import build, machine_of
    >>> from emberkv.sim.config import opened
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> config, workload = opened({"workload": chat}, {"replicas": 2})
    >>> outcomes = []
    >>> machine = machine_of(config, block_size=16)
    >>> end = build(config, machine, workload.source(), outcomes.append, lambda done, now: None).run()
    >>> len(outcomes), end.interrupted
    (12, False)
    """

    def __init__(
        self,
        source: Source,
        replicas: Sequence[Replica],
        routers: Sequence[Router],
        *,
        root_of: RootOf,
        block_size: int,
        emit: Callable[[RequestOutcome], None],
        outages: Sequence[Iterator[Outage]] = (),
        max_retries: int = 3,
        request_seconds: float = 0.0,
        request_token_seconds: float = 0.0,
        stop_at: float | None = None,
        tenants: bool = False,
        progress: Progress = lambda done, now: None,
    ) -> None:
        self.series = Series([ReplicaSeries() for _ in replicas])
        self._source = source
        self.replicas = replicas
        self._gateways = [RoutedReplicas(router, [replica.state for replica in replicas]) for router in routers]
        self._followers = [gateway for gateway in self._gateways if gateway.follows_pools]
        self._turn = cycle(self._gateways)
        self._root_of, self._block_size = root_of, block_size
        self._emit = emit
        self._outages = outages
        self._max_retries = max_retries
        self._request_seconds = (request_seconds, request_token_seconds)
        self._stop_at = None if stop_at is None else nanoseconds(stop_at)
        self._tenants = tenants
        self._progress = progress
        self._events = EventQueue()
        self._sessions = Sessions()
        self._stranded: list[SimulatedRequest] = []
        self._entering: dict[SimulatedRequest, None] = {}
        self._woken: set[int] = set()
        self._now = 0
        self._open = 0
        self._done = 0

    def run(self) -> SimulationEnd:
        """Run to the end, to ``stop_at``, or to the user's interrupt (KeyboardInterrupt), which leaves all in order.

        Raises WorkloadError when the source does.
        """
        interrupted = False
        try:
            self._await_source()
            for outages in self._outages:
                self._await_outage(outages)
            self._run()
        except KeyboardInterrupt:
            interrupted = True
        for replica in self.replicas:
            replica.stop(self._now)
        in_flight = [simulated for replica in self.replicas for simulated in replica.requests]
        in_flight += [*self._entering, *self._stranded]
        for simulated in sorted(in_flight, key=lambda each: each.arrival):
            self._end(simulated, Status.UNFINISHED)
        return SimulationEnd(self._now / NANOSECONDS, interrupted)

    def _run(self) -> None:
        events = self._events
        while self._open and (now := events.next_time) is not None:
            if self._stop_at is not None and now > self._stop_at:
                self._now = self._stop_at
                self.series.until(self._now, self.replicas)
                return
            self._now = now
            if now > self.series.next_time:
                self.series.until(now, self.replicas)
            events.run_next()
            for index in sorted(self._woken):
                self._start(self.replicas[index])
            self._woken.clear()

    def _await_source(self) -> None:
        request = self._source.next_arrival()
        if request is not None:
            self._await(request, None, self._await_source)

    def _await(self, request: Request, earlier: ContentChain | None, then: Callable[[], None]) -> None:
        """Schedule the arrival of a request. earlier: the chain of the turn before. then: called after the arrival."""
        self._open += 1
        arrival = max(self._now, nanoseconds(request.arrival_time))
        chain = request.chain(self._root_of(request), self._block_size, earlier)
        simulated = SimulatedRequest(request, arrival, chain, tenant=request.client_id if self._tenants else "")
        self._events.add(arrival, EventKind.ARRIVAL, partial(self._arrive, simulated, then))

    def _arrive(self, simulated: SimulatedRequest, then: Callable[[], None]) -> None:
        simulated.turn = self._sessions.turn_of(simulated.request, simulated.chain.block_hashes)
        once, each_token = self._request_seconds
        delay = nanoseconds(once + each_token * simulated.request.prompt_tokens)
        if delay:
            self._entering[simulated] = None
            self._events.add(self._now + delay, EventKind.ARRIVAL, partial(self._enter, simulated))
        else:
            self._send(simulated)
        then()

    def _enter(self, simulated: SimulatedRequest) -> None:
        del self._entering[simulated]
        self._send(simulated)

    def _send(self, simulated: SimulatedRequest) -> None:
        request = simulated.request
        now = self._now / NANOSECONDS
        asked = RoutingRequest(simulated.chain, request.prompt_tokens, request.session_id, now)
        decision = next(self._turn).decide(asked)
        if decision is None:
            self._stranded.append(simulated)
            return
        replica = self.replicas[decision.replica]
        replica.submit(simulated, decision.cached_tokens)
        self._wake(replica)

    def _wake(self, replica: Replica) -> None:
        """Have a replica looked at when its step ends, or at once: something happened to it."""
        self._woken.add(replica.index)
        step = replica.step
        if step is None:
            return
        ends = step.ends
        replica.interrupt(self._now)
        if step.ends != ends:
            self._await_end(replica, step)

    def _await_end(self, replica: Replica, step: Step) -> None:
        self._events.add(step.ends, EventKind.STEP_ENDS, partial(self._end_step, replica, step), rank=replica.index)

    def _start(self, replica: Replica) -> None:
        if replica.step is not None or not replica.state.up:
            return
        for simulated in replica.add_arrivals():
            self._lose(simulated, Status.REJECTED)
        step = replica.begin(self._now)
        self._publish(replica)
        if step is not None:
            self._await_end(replica, step)
        for transfer in replica.take_new_transfers():
            ends = partial(self._end_load, replica, transfer)
            self._events.add(transfer.ends, EventKind.LOAD_ENDS, ends, rank=replica.index)

    def _end_step(self, replica: Replica, step: Step) -> None:
        if replica.step is not step or step.ends != self._now:
            return  # cut short meanwhile, or lost
        for simulated in replica.end_step():
            self._complete(simulated)
        self._publish(replica)
        self._woken.add(replica.index)

    def _publish(self, replica: Replica) -> None:
        """Have the routers' indexes follow what has changed in a replica's pool."""
        for gateway in self._followers:
            gateway.publish(replica.index, replica.pool)

    def _end_load(self, replica: Replica, transfer: Transfer) -> None:
        if replica.end_load(transfer):
            self._wake(replica)

    def _complete(self, simulated: SimulatedRequest) -> None:
        request, chain = simulated.request, simulated.chain
        self._sessions.completed(request, chain.block_hashes, len(chain))
        self._end(simulated, Status.COMPLETED, self._now)
        follow_up = self._source.completed(request, self._now / NANOSECONDS, len(chain) - request.prompt_tokens)
        if follow_up is not None:
            self._await(follow_up, chain, _nothing)

    def _lose(self, simulated: SimulatedRequest, status: Status) -> None:
        self._end(simulated, status)
        self._source.lost(simulated.request)

    def _end(self, simulated: SimulatedRequest, status: Status, completion: int | None = None) -> None:
        self._open -= 1
        self._done += 1
        self._emit(simulated.outcome(status, completion))
        if self._done % PROGRESS_EVERY == 0:
            self._progress(self._done, self._now / NANOSECONDS)

    def _await_outage(self, outages: Iterator[Outage]) -> None:
        outage = next(outages, None)
        if outage is not None:
            at = max(self._now, nanoseconds(outage.at))
            self._events.add(at, EventKind.FAILURE, partial(self._fail, outage, outages), rank=outage.replica)

    def _fail(self, outage: Outage, outages: Iterator[Outage]) -> None:
        replica = self.replicas[outage.replica]
        lost = replica.fail(self._now)
        for gateway in self._gateways:
            gateway.lost(replica.index)
        for tier in replica.lower.tiers if replica.lower is not None else ():
            tier.publish_all()
        for simulated in lost:
            if simulated.retries == self._max_retries:
                self._lose(simulated, Status.FAILED)
            else:
                simulated.retries += 1
                self._send(simulated)
        if outage.down_for is not None:
            up = self._now + nanoseconds(outage.down_for)
            self._events.add(up, EventKind.RESTART, partial(self._restart, replica, outages), rank=replica.index)

    def _restart(self, replica: Replica, outages: Iterator[Outage]) -> None:
        replica.state.up = True
        stranded, self._stranded = self._stranded, []
        for simulated in stranded:
            self._send(simulated)
        self._await_outage(outages)


def _nothing() -> None:
    """Nothing else is to be scheduled once a follow-up has arrived."""
