"""Routing policies: which replica gets a request, as a pure function of what is known of the replicas.

A policy keeps no state. All that it decides from is in the `RoutingView`, so a recorded view gives the same decision
again, in another process or in a simulation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from math import ceil

from emberkv.core.events import POOL
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError

KEY_BLOCKS = 2
"""Leading blocks that make a request's hash key. The first alone is often a system prompt that everybody shares."""

LOAD_BOUND = 1.25
"""Most load of a replica as a multiple of the mean, where it is bounded."""


@dataclass(slots=True)
class ReplicaState:
    """What is known of a replica when a request is routed; its driver keeps it up to date.

    load: tokens of work that the replica has, prompts of running requests included. up: whether it takes requests.
    queued_tokens: prompt tokens that it has yet to compute for requests sent to it before. prefill_rate: prompt tokens
    that it computes in a second, as measured; None before any was. step_seconds: of a step without prefill.
    load_rates: tokens a second that it loads from each tier below its pool, as measured.
    """

    load: float = 0.0
    up: bool = True
    queued_tokens: float = 0.0
    prefill_rate: float | None = None
    step_seconds: float = 0.0
    load_rates: Mapping[str, float] = field(default_factory=dict)


class Order(Enum):
    """In which order a policy wants to have the replicas."""

    NONE = "none"
    RING = "ring"  # by consistent hashing of the policy's key
    TURN = "turn"  # each decision begins behind the replica that the last one chose
    RANDOM = "random"


class Reason(StrEnum):
    """Why a replica was chosen."""

    RANDOM = "random"
    TURN = "turn"
    LEAST_LOADED = "least_loaded"
    HASH = "hash"
    HASH_NEXT = "hash_next"  # the replica that the key belongs to is down or has too much load
    LONGEST_PREFIX = "longest_prefix"


@dataclass(frozen=True, slots=True)
class RoutingView:
    """All that a policy decides from. Replicas are known by their slots, which count from 0.

    cached: for each slot, how many leading blocks of the prompt each tier has ("pool" and the tiers below it), fastest
    first; empty where the policy does not read the index. order: slots, as the policy's `Order` says. home: the slot
    that had the session's last request.
    """

    prompt_tokens: int
    block_size: int
    replicas: Sequence[ReplicaState]
    cached: Sequence[Mapping[str, int]] = ()
    order: Iterable[int] = ()
    home: int | None = None

    @property
    def up(self) -> list[int]:
        """Slots of the replicas that take requests."""
        return [slot for slot, state in enumerate(self.replicas) if state.up]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would meet at one replica, in seconds and tokens.

    waiting: until what was sent to it before is computed. loading: by tier. computing: the rest of the prompt.
    cached_tokens: by tier, the pool's as "pool".
    """

    slot: int
    waiting: float
    computing: float
    loading: Mapping[str, float] = field(default_factory=dict)
    cached_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def ttft(self) -> float:
        """Expected time to first token."""
        return self.waiting + sum(self.loading.values()) + self.computing


@dataclass(frozen=True, slots=True)
class Decision:
    """replica: the slot chosen, and why. estimates: of the replicas that are up, by policies that make them."""

    replica: int
    reason: Reason
    estimates: Sequence[Estimate] = ()


class RoutingPolicy(ABC):
    """reads_index: whether `RoutingView.cached` is wanted. order: which `RoutingView.order` is."""

    reads_index = False
    order = Order.NONE

    @abstractmethod
    def choose(self, view: RoutingView) -> Decision:
        """One of the replicas that are up, of which there must be one."""

    def key(self, block_hashes: Sequence[BlockHash], cached: Sequence[Mapping[str, int]]) -> BlockHash | None:
        """What is hashed for `Order.RING`; None for a prompt that has nothing to share."""
        return None


def least_loaded(view: RoutingView) -> int:
    """Of equal ones the first."""
    return min((state.load, slot) for slot, state in enumerate(view.replicas) if state.up)[1]


class RandomChoice(RoutingPolicy):
    """Any that is up, each as likely."""

    order = Order.RANDOM

    def choose(self, view: RoutingView) -> Decision:
        return Decision(_first_up(view), Reason.RANDOM)


class RoundRobin(RoutingPolicy):
    """One after the other."""

    order = Order.TURN

    def choose(self, view: RoutingView) -> Decision:
        return Decision(_first_up(view), Reason.TURN)


class LeastLoaded(RoutingPolicy):
    """The one with the least load."""

    def choose(self, view: RoutingView) -> Decision:
        return Decision(least_loaded(view), Reason.LEAST_LOADED)


class ConsistentHashing(RoutingPolicy):
    """Equal beginnings go to the same replica; a prompt without a full block shares nothing and goes to the least
    loaded.

    bound: None, or c > 1: no replica gets a request while its load exceeds c times the mean; the next on the ring
    takes it (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018).
    """

    order = Order.RING

    def __init__(self, *, key_blocks: int = KEY_BLOCKS, bound: float | None = None) -> None:
        if key_blocks < 1 or (bound is not None and bound <= 1):
            raise ConfigError(f"key_blocks is {key_blocks}, bound {bound}; at least 1, and above 1")
        self._key_blocks = key_blocks
        self._bound = bound

    def key(self, block_hashes: Sequence[BlockHash], cached: Sequence[Mapping[str, int]]) -> BlockHash | None:
        """The block hash of the first ``key_blocks`` blocks together, of fewer where there are not as many."""
        return block_hashes[min(self._key_blocks, len(block_hashes)) - 1] if block_hashes else None

    def choose(self, view: RoutingView) -> Decision:
        most = self._most(view)
        for position, slot in enumerate(view.order):
            state = view.replicas[slot]
            if state.up and (most is None or state.load <= most):
                return Decision(slot, Reason.HASH_NEXT if position else Reason.HASH)
        return Decision(least_loaded(view), Reason.LEAST_LOADED)

    def _most(self, view: RoutingView) -> float | None:
        if self._bound is None:
            return None
        loads = [state.load for state in view.replicas if state.up]
        return ceil(self._bound * sum(loads) / len(loads))


class LongestPrefix(RoutingPolicy):
    """The replica whose pool has most of the prompt's beginning, of equal ones the first.

    load_weight: tokens of a hit that a token of load above the least loaded replica's outweighs. At 0, which is pure
    longest prefix, one replica attracts all that share a system prompt.
    """

    reads_index = True

    def __init__(self, *, load_weight: float = 0.0) -> None:
        if load_weight < 0:
            raise ConfigError(f"load_weight is {load_weight}; it must be at least 0")
        self._weight = load_weight

    def choose(self, view: RoutingView) -> Decision:
        scores = (
            (view.block_size * view.cached[slot].get(POOL, 0) - self._weight * state.load, -slot)
            for slot, state in enumerate(view.replicas)
            if state.up
        )
        return Decision(-max(scores)[1], Reason.LONGEST_PREFIX)


def _first_up(view: RoutingView) -> int:
    return next(slot for slot in view.order if view.replicas[slot].up)
