"""The routing policies: which replica a request goes to, from its blocks' hashes and what is known of replicas.

Pure decisions over plain state, so that a simulation and a gateway route with the same objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.hash_ring import HashRing
from emberkv.core.hashing import BlockHash, Chain
from emberkv.errors import ConfigError

KEY_BLOCKS = 2
"""Leading blocks that make a request's hash key. The first alone is often a system prompt that everybody shares."""

LOAD_BOUND = 1.25
"""Most load of a replica as a multiple of the mean, where it is bounded."""


@dataclass(slots=True)
class ReplicaState:
    """load: tokens of work that the replica has, as its driver counts them. up: whether it takes requests."""

    load: float = 0.0
    up: bool = True


class Router(ABC):
    """Chooses among replicas numbered from 0.

    index: which replica has which blocks, for its driver to keep up to date; None where the policy does not ask.
    """

    index: BlockIndex | None = None

    @abstractmethod
    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        """One of those that are up, of which there must be one."""


def least_loaded(replicas: Sequence[ReplicaState]) -> int:
    """Of equal ones the first."""
    return min((state.load, index) for index, state in enumerate(replicas) if state.up)[1]


class RandomChoice(Router):
    """Any that is up, each as likely."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        return self._rng.choice([index for index, state in enumerate(replicas) if state.up])


class RoundRobin(Router):
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        for step in range(len(replicas)):
            index = (self._next + step) % len(replicas)
            if replicas[index].up:
                break
        self._next = index + 1
        return index


class LeastLoaded(Router):
    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        return least_loaded(replicas)


def hash_key(block_hashes: Sequence[BlockHash], blocks: int) -> BlockHash | None:
    """The block hash of the first ``blocks`` blocks together, of fewer where there are not as many; None of none."""
    return block_hashes[min(blocks, len(block_hashes)) - 1] if block_hashes else None


class ConsistentHashing(Router):
    """Equal beginnings go to the same replica; a prompt without a full block shares nothing and goes to the least
    loaded.

    bound: None, or c > 1: no replica gets a request while its load exceeds c times the mean; the next on the ring
    takes it (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018).
    """

    def __init__(self, names: Sequence[str], *, key_blocks: int = KEY_BLOCKS, bound: float | None = None) -> None:
        if key_blocks < 1 or (bound is not None and bound <= 1):
            raise ConfigError(f"key_blocks is {key_blocks}, bound {bound}; at least 1, and above 1")
        self._ring = HashRing(names)
        self._key_blocks = key_blocks
        self._bound = bound

    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        key = hash_key(chain.block_hashes, self._key_blocks)
        if key is None:
            return least_loaded(replicas)
        most = self._most(replicas)
        for index in self._ring.order(key):
            state = replicas[index]
            if state.up and (most is None or state.load <= most):
                return index
        return least_loaded(replicas)

    def _most(self, replicas: Sequence[ReplicaState]) -> float | None:
        if self._bound is None:
            return None
        loads = [state.load for state in replicas if state.up]
        return ceil(self._bound * sum(loads) / len(loads))


class LongestPrefix(Router):
    """The replica that has most of the prompt's beginning, of equal ones the first.

    load_weight: tokens of a hit that a token of load above the least loaded replica's outweighs. At 0, which is pure
    longest prefix, one replica attracts all that share a system prompt.
    """

    def __init__(self, *, load_weight: float = 0.0) -> None:
        if load_weight < 0:
            raise ConfigError(f"load_weight is {load_weight}; it must be at least 0")
        self._blocks = self.index = BlockIndex()
        self._weight = load_weight

    def choose(self, chain: Chain, replicas: Sequence[ReplicaState]) -> int:
        matches = self._blocks.matches(chain.block_hashes, len(replicas))
        scores = (
            (chain.block_size * matches[index] - self._weight * state.load, -index)
            for index, state in enumerate(replicas)
            if state.up
        )
        return -max(scores)[1]


_ROUTERS: dict[str, Callable[[int, Random], Router]] = {
    "random": lambda count, rng: RandomChoice(rng),
    "round-robin": lambda count, rng: RoundRobin(),
    "least-loaded": lambda count, rng: LeastLoaded(),
    "consistent-hashing": lambda count, rng: ConsistentHashing(names(count)),
    "bounded-hashing": lambda count, rng: ConsistentHashing(names(count), bound=LOAD_BOUND),
    "longest-prefix": lambda count, rng: LongestPrefix(),
    "prefix-minus-load": lambda count, rng: LongestPrefix(load_weight=1.0),
}
ROUTER_NAMES = tuple(_ROUTERS)


def names(count: int) -> list[str]:
    """What replicas are called where they have no names."""
    return [f"replica-{index}" for index in range(count)]


def make_router(name: str, replicas: int, rng: Random) -> Router:
    """A fresh policy for ``replicas`` replicas. Raises ConfigError for a name outside ROUTER_NAMES."""
    if name not in _ROUTERS:
        raise ConfigError(f"routing policy {name!r} is unknown; use one of {', '.join(ROUTER_NAMES)}")
    if replicas < 1:
        raise ConfigError(f"{replicas} replicas; at least 1 is needed")
    return _ROUTERS[name](replicas, rng)
