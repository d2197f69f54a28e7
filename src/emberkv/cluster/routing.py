"""The router: what is known of all replicas, and a policy that decides from it where a request goes.

Pure decisions over plain state, without a clock or a network, so that a simulation and a gateway route with the same
objects.

    router = make_router("prefix-minus-load", Random(0))
    slots = [router.join(name) for name in ("worker-0", "worker-1")]
    states = [ReplicaState() for _ in slots]       # by slot; their driver keeps them up to date
    decision = router.decide(RoutingRequest(chain, len(chain)), states)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as joined
from random import Random

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.hash_ring import HashRing
from emberkv.cluster.policies import (
    LOAD_BOUND,
    ConsistentHashing,
    Decision,
    Estimate,
    LeastLoaded,
    LongestPrefix,
    Order,
    RandomChoice,
    Reason,
    ReplicaState,
    RoundRobin,
    RoutingPolicy,
    RoutingView,
)
from emberkv.core.events import POOL
from emberkv.core.hashing import BlockHash, Chain
from emberkv.errors import ConfigError

__all__ = [
    "ROUTER_NAMES", "Decision", "Estimate", "Reason", "ReplicaState", "Router", "RoutingRequest", "make_router", "names"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """A request as routing sees it.

    chain: the prompt's blocks. session_id: "" for none. now: seconds of any clock that does not go back.
    """

    chain: Chain
    prompt_tokens: int
    session_id: str = ""
    now: float = 0.0


class Router:
    """Chooses among replicas that come and go. Each has a slot, a number from 0 that is used again after it has left.

    index: which slot has which blocks, for the driver to keep up to date; None where the policy does not read it.
    """

    def __init__(self, policy: RoutingPolicy, rng: Random) -> None:
        self.index = BlockIndex() if policy.reads_index else None
        self._policy = policy
        self._rng = rng
        self._ring = HashRing()
        self._names: list[str | None] = []
        self._next = 0  # the slot after the one that was chosen last

    def join(self, name: str) -> int:
        """A replica is there; returns its slot, the lowest that is free. Raises ConfigError for a name in use."""
        slot = self._names.index(None) if None in self._names else len(self._names)
        self._ring.join(name, slot)
        self._names[slot : slot + 1] = [name]
        return slot

    def leave(self, slot: int) -> None:
        """A replica is gone for good; its slot is free."""
        name = self._names[slot]
        assert name is not None, "a slot is left once"
        self.lost(slot)
        self._ring.leave(name)
        self._names[slot] = None

    def lost(self, slot: int) -> None:
        """A replica has lost all that it had, and keeps its slot: it has restarted, or may come back."""
        if self.index is not None:
            self.index.forget(slot)

    def decide(self, request: RoutingRequest, replicas: Sequence[ReplicaState]) -> Decision | None:
        """Where a request goes; None while no replica is up.

        replicas: by slot, as many as there are slots. One of a free slot must not be up.
        """
        if not any(state.up for state in replicas):
            return None
        decision = self._policy.choose(self._view(request, replicas))
        self._next = decision.replica + 1
        return decision

    def _view(self, request: RoutingRequest, replicas: Sequence[ReplicaState]) -> RoutingView:
        block_hashes = request.chain.block_hashes
        cached: Sequence[Mapping[str, int]] = ()
        if self.index is not None:
            cached = [{POOL: blocks} for blocks in self.index.matches(block_hashes, len(replicas))]
        order = self._order(self._policy.key(block_hashes, cached), replicas)
        return RoutingView(request.prompt_tokens, request.chain.block_size, replicas, cached, order)

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
}
ROUTER_NAMES = tuple(_POLICIES)


def names(count: int) -> list[str]:
    """What replicas are called where they have no names."""
    return [f"replica-{index}" for index in range(count)]


def make_router(name: str, rng: Random, members: Sequence[str] = ()) -> Router:
    """A router by the name of its policy. members: replicas that are there from the beginning, in slots from 0.

    Raises ConfigError for a name outside ROUTER_NAMES, and for members of the same name.
    """
    if name not in _POLICIES:
        raise ConfigError(f"routing policy {name!r} is unknown; use one of {', '.join(ROUTER_NAMES)}")
    router = Router(_POLICIES[name](), rng)
    for member in members:
        router.join(member)
    return router
