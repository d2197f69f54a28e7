"""The router: what is known of all replicas, the prompts on their way to them, and a policy that decides from it where
a request goes.

Pure decisions over plain state, without a clock or a network, so that a simulation and a gateway route with the same
objects.

    router = make_router(DEFAULT_ROUTING, Random(0))
    slots = [router.join(name) for name in ("worker-0", "worker-1")]
    states = [ReplicaState() for _ in slots]       # by slot; their driver keeps them up to date
    decision = router.decide(RoutingRequest(chain, len(chain)), states)

A replica's events tell of a block when it is computed. Until then, a request with the same beginning would be sent
elsewhere and compute it a second time; so blocks that a replica is about to have count as in flight.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain as joined
from itertools import count
from random import Random
from typing import NamedTuple

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.hash_ring import HashRing
from emberkv.cluster.policies import (
    IN_FLIGHT,
    LOAD_BOUND,
    ConsistentHashing,
    Decision,
    Estimate,
    ExpectedTtft,
    LeastLoaded,
    LongestPrefix,
    Order,
    RandomChoice,
    ReplicaState,
    RoundRobin,
    RoutingPolicy,
    RoutingReason,
    RoutingView,
)
from emberkv.core.events import POOL
from emberkv.core.hashing import BlockHash, Chain
from emberkv.errors import ConfigError

__all__ = [
    "DEFAULT_ROUTING",
    "ROUTER_NAMES",
    "Decision",
    "Estimate",
    "ReplicaState",
    "Router",
    "RoutingReason",
    "RoutingRequest",
    "make_policy",
    "make_router",
    "names",
]  # fmt: skip

DEFAULT_ROUTING = "expected-ttft"

Recorder = Callable[[float, RoutingView, Decision], None]
"""Called with the request's time, what the policy decided from, and its decision."""

MAX_SESSIONS = 100_000
"""Sessions whose replica is remembered; the longest unused is forgotten first."""

RECENT_REQUESTS = 200
"""Requests of each replica over which the tokens given to it are averaged."""

MOST_UNIT = 1e100

IN_FLIGHT_SECONDS = 2.0
"""A prompt counts as being computed for so long, and twice the expected time to its first token."""


class RoutingRequest(NamedTuple):
    """A request as routing sees it.

    chain: the prompt's blocks. session_id: "" for none. now: seconds of any clock that does not go back.
    """

    chain: Chain
    prompt_tokens: int
    session_id: str = ""
    now: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    slot: int
    block_hashes: Sequence[BlockHash]


class PromptsInFlight:
    """Prompts that were sent to replicas, each until its time to live is over.

    A prompt is found by some of its block hashes: those at depths that grow by about half. Two prompts with a
    block hash in common have all blocks before it in common, so the exact depth is found by bisection from there.

    >>> in_flight = PromptsInFlight()
    >>> system, one, other = bytes(32), bytes([1] * 32), bytes([2] * 32)
    >>> in_flight.add(3, [system, one], until=10.0)
    >>> in_flight.depths([system, other], now=5.0)
    {3: 1}
    >>> in_flight.depths([system, other], now=11.0)
    {}
    """

    def __init__(self) -> None:
        self._by_hash: dict[BlockHash, dict[int, _Prompt]] = {}  # of each slot, the latest prompt with that block
        self._ends: list[tuple[float, int, _Prompt]] = []
        self._added = count()

    def add(self, slot: int, block_hashes: Sequence[BlockHash], until: float) -> None:
        """A prompt was sent to a replica. until: when it is forgotten."""
        prompt = _Prompt(slot, block_hashes)
        for depth in _depths(len(block_hashes)):
            self._by_hash.setdefault(block_hashes[depth - 1], {})[slot] = prompt
        heappush(self._ends, (until, next(self._added), prompt))

    def depths(self, block_hashes: Sequence[BlockHash], now: float) -> dict[int, int]:
        """By slot, how many leading blocks are being computed there."""
        while self._ends and self._ends[0][0] < now:
            self._remove(heappop(self._ends)[2])
        found: dict[int, int] = {}
        if not self._by_hash:
            return found
        for depth in reversed(_depths(len(block_hashes))):
            for slot, prompt in self._by_hash.get(block_hashes[depth - 1], {}).items():
                if slot not in found:
                    found[slot] = _common(prompt.block_hashes, block_hashes, depth)
        return found

    def forget(self, slot: int) -> None:
        """The replica has lost its requests."""
        gone = [each for each in self._ends if each[2].slot == slot]
        self._ends = sorted(each for each in self._ends if each[2].slot != slot)
        for _, _, prompt in gone:
            self._remove(prompt)

    def _remove(self, prompt: _Prompt) -> None:
        for depth in _depths(len(prompt.block_hashes)):
            block_hash = prompt.block_hashes[depth - 1]
            by_slot = self._by_hash.get(block_hash)
            if by_slot is not None and by_slot.get(prompt.slot) is prompt:
                del by_slot[prompt.slot]
                if not by_slot:
                    del self._by_hash[block_hash]


def _all_depths(most: int) -> Iterator[int]:
    depth = 1
    while depth <= most:
        yield depth
        depth += 1 + depth // 2


_DEPTHS = tuple(_all_depths(1 << 40))


def _depths(blocks: int) -> Sequence[int]:
    """The depths by which a prompt of so many blocks is found, ascending."""
    return _DEPTHS[: bisect_right(_DEPTHS, blocks)]


def _common(one: Sequence[BlockHash], other: Sequence[BlockHash], known: int) -> int:
    """How many leading blocks two chains have in common, of which ``known`` are known to be equal."""
    longest = min(len(one), len(other))
    return known + bisect_left(range(known, longest), True, key=lambda at: one[at] != other[at])


class Router:
    """Chooses among replicas that come and go. Each has a slot, a number from 0 that is used again after it has left.

    index: which slot has which blocks, for the driver to keep up to date; None where the policy does not read it.
    record: takes each decision with what it was made from, such as `decision_log.DecisionLog.record`.
    """

    def __init__(self, policy: RoutingPolicy, rng: Random, *, record: Recorder | None = None) -> None:
        self.record = record
        self.index = BlockIndex() if policy.reads_index else None
        self._policy = policy
        self._rng = rng
        self._in_flight = PromptsInFlight()
        self._sessions: OrderedDict[str, int] = OrderedDict()  # slots of the last requests, the latest last
        self._recent: list[float] = []
        self._unit = 1.0  # of the latest in _recent: a growing unit lets earlier ones count less
        self._ring = HashRing()
        self._names: list[str | None] = []
        self._next = 0  # the slot after the one that was chosen last

    @property
    def slots(self) -> int:
        """How many there are, free ones included."""
        return len(self._names)

    def join(self, name: str) -> int:
        """A replica is there; returns its slot, the lowest that is free. Raises ConfigError for a name in use."""
        slot = self._names.index(None) if None in self._names else len(self._names)
        self._ring.join(name, slot)
        known = [self._recent[other] for other, name in enumerate(self._names) if name is not None]
        self._names[slot : slot + 1] = [name]
        self._recent[slot : slot + 1] = [sum(known) / len(known) if known else 0.0]
        return slot

    def leave(self, slot: int) -> None:
        """A replica is gone for good; its slot is free."""
        name = self._names[slot]
        assert name is not None, "a slot is left once"
        self.lost(slot)
        if self.index is not None:
            self.index.leave(slot)
        self._ring.leave(name)
        self._names[slot] = None

    def lost(self, slot: int) -> None:
        """A replica has lost all that it had, except what is in tiers that it shares, and keeps its slot: it has
        restarted, or may come back.
        """
        if self.index is not None:
            self.index.forget(slot)
        self._in_flight.forget(slot)
        self._sessions = OrderedDict(each for each in self._sessions.items() if each[1] != slot)

    def decide(
        self,
        request: RoutingRequest,
        replicas: Sequence[ReplicaState],
        counts: Callable[[Decision], bool] = lambda _: True,
    ) -> Decision | None:
        """Where a request goes; None while no replica is up.

        replicas: by slot, as many as there are slots. One of a free slot must not be up. counts: whether a decision is
        recorded, and remembered for those that follow.
        """
        if not any(state.up for state in replicas):
            return None
        view = self._view(request, replicas)
        decision = self._policy.choose(view)
        if not counts(decision):
            return decision
        if self.record is not None:
            self.record(request.now, view, decision)
        self._next = decision.replica + 1
        if self._policy.follows_requests:
            self._follow(request, decision)
        return decision

    def consider(self, request: RoutingRequest, replicas: Sequence[ReplicaState]) -> Decision | None:
        """What `decide` would decide now; nothing is remembered of it."""
        return self.decide(request, replicas, lambda _: False)

    def _view(self, request: RoutingRequest, replicas: Sequence[ReplicaState]) -> RoutingView:
        block_hashes = request.chain.block_hashes
        cached = [] if self.index is None else self.index.matches(block_hashes, len(replicas))
        if self._policy.follows_requests:
            for slot, depth in self._in_flight.depths(block_hashes, request.now).items():
                if depth > sum(cached[slot].values()):
                    pool = cached[slot].get(POOL, 0)
                    cached[slot] = {POOL: pool, IN_FLIGHT: depth - pool}
        order = self._order(self._policy.key(block_hashes, cached), replicas)
        home = self._sessions.get(request.session_id)
        if self.record is not None:
            order = tuple(order)  # an iterator is gone when the policy has read it
        recent = [each / self._unit for each in self._recent] if self._policy.follows_requests else []
        return RoutingView(request.prompt_tokens, request.chain.block_size, replicas, cached, order, recent, home)

    def _follow(self, request: RoutingRequest, decision: Decision) -> None:
        """Remember a decision for those that follow."""
        slot = decision.replica
        self._unit /= 1.0 - 1.0 / (RECENT_REQUESTS * len(self._recent))
        self._recent[slot] += self._unit * max(1, request.prompt_tokens - decision.cached_tokens)
        if self._unit > MOST_UNIT:
            self._recent = [each / self._unit for each in self._recent]
            self._unit = 1.0
        assert decision.chosen is not None, "a policy that follows requests makes estimates"
        until = request.now + IN_FLIGHT_SECONDS + 2 * decision.chosen.ttft
        self._in_flight.add(slot, request.chain.block_hashes, until)
        if request.session_id:
            self._sessions[request.session_id] = slot
            self._sessions.move_to_end(request.session_id)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _order(self, key: BlockHash | None, replicas: Sequence[ReplicaState]) -> Iterable[int]:
        match self._policy.order:
            case Order.RING if key is not None:
                return self._ring.order(key)
            case Order.TURN:
                return joined(range(self._next, len(replicas)), range(min(self._next, len(replicas))))
            case Order.RANDOM:
                return (self._rng.choice([slot for slot, state in enumerate(replicas) if state.up]),)
            case _:
                return ()


_POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "random": RandomChoice,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "consistent-hashing": ConsistentHashing,
    "bounded-hashing": lambda: ConsistentHashing(bound=LOAD_BOUND),
    "longest-prefix": LongestPrefix,
    "prefix-minus-load": lambda: LongestPrefix(load_weight=1.0),
    DEFAULT_ROUTING: ExpectedTtft,
}
ROUTER_NAMES = tuple(_POLICIES)


def names(count: int) -> list[str]:
    """What replicas are called where they have no names."""
    return [f"replica-{index}" for index in range(count)]


def make_policy(name: str) -> RoutingPolicy:
    """A policy by its name. Raises ConfigError for a name outside ROUTER_NAMES."""
    if name not in _POLICIES:
        raise ConfigError(f"routing policy {name!r} is unknown; use one of {', '.join(ROUTER_NAMES)}")
    return _POLICIES[name]()


def make_router(name: str, rng: Random, members: Sequence[str] = ()) -> Router:
    """A router by the name of its policy. members: replicas that are there from the beginning, in slots from 0.

    Raises ConfigError for a name outside ROUTER_NAMES, and for members of the same name.
    """
    router = Router(make_policy(name), rng)
    for member in members:
        router.join(member)
    return router
