"""Routing policies: which replica gets a request, as a pure function of what is known of the replicas.

A policy keeps no state. All that it decides from is in the `RoutingView`, so a recorded view gives the same decision
again, in another process or in a simulation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from math import ceil, inf
from typing import ClassVar, NamedTuple, overload

from emberkv.core.events import POOL
from emberkv.core.hashing import BlockHash
from emberkv.errors import ConfigError

KEY_BLOCKS = 2
"""Leading blocks that make a request's hash key. The first alone is often a system prompt that all requests share."""

LOAD_BOUND = 1.25
"""Most load of a replica as a multiple of the mean, where it is bounded."""

IN_FLIGHT = "in_flight"
"""In place of a tier: blocks that a replica has not yet, but computes for a request that was sent to it before."""

ASSUMED_RATE = 10_000.0
"""Prompt tokens a second, while no replica has measured any."""

EQUAL_RATES = 1.5
"""Measured rates within this factor of the mean are taken to be the mean: longer prompts are computed more slowly, so
rates of equal machines differ by what they were given lately.
"""

FIRST_PROMPTS = 8
"""What replicas were given lately matters little until it is more than so many prompts."""

UNMEASURED_LOAD = 0.25
"""Time to load from a tier whose rate was not measured yet, as a share of the time to compute the same."""

_NOTHING: Mapping[str, int] = {}
"""Of a replica that has nothing of the prompt: all such share it."""


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


class RoutingReason(StrEnum):
    """Why a replica was chosen."""

    RANDOM = "random"
    TURN = "turn"
    LEAST_LOADED = "least_loaded"
    HASH = "hash"
    HASH_NEXT = "hash_next"  # the replica that the key belongs to is down or has too much load
    LONGEST_PREFIX = "longest_prefix"
    LEAST_COST = "least_cost"
    SESSION = "session"  # among those that cost about the least, the one that has the session
    TIE = "tie"  # among those that cost about the least, the first by consistent hashing
    ONLY = "only"  # there is one replica
    SEQUENCE = "sequence"  # the request says which; no policy is asked


class RoutingView(NamedTuple):
    """All that a policy decides from. Replicas are known by their slots, which count from 0.

    cached: for each slot, how many leading blocks of the prompt each tier has ("pool", the tiers below it, and
    `IN_FLIGHT`); empty where the policy does not read the index. order: slots, as the policy's `Order` says. recent:
    for each slot, the prompt tokens that it was lately given to compute. home: the slot that had the
    session's last request.
    """

    prompt_tokens: int
    block_size: int
    replicas: Sequence[ReplicaState]
    cached: Sequence[Mapping[str, int]] = ()
    order: Iterable[int] = ()
    recent: Sequence[float] = ()
    home: int | None = None

    @property
    def up(self) -> list[int]:
        """Slots of the replicas that take requests."""
        return [slot for slot, state in enumerate(self.replicas) if state.up]


@dataclass(slots=True)
class Estimate:
    """What a request would meet at one replica, in seconds and tokens.

    waiting: until what was sent to it before is computed. loading: by tier. computing: the rest of the prompt.
    cached_tokens: by tier, the pool's as "pool". cost: what replicas are compared by.
    """

    slot: int
    waiting: float
    computing: float
    cost: float
    loading: Mapping[str, float] = field(default_factory=dict)
    cached_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def ttft(self) -> float:
        """Expected time to first token."""
        return self.waiting + sum(self.loading.values()) + self.computing


_EstimateFields = tuple[int, float, float, float, Mapping[str, float], Mapping[str, int]]
"""An `Estimate`'s, in their order."""


class _Estimates(Sequence[Estimate]):
    """Estimates that are made when they are read: of most decisions none is, and there may be many."""

    def __init__(self, fields: Sequence[_EstimateFields]) -> None:
        self._fields = fields

    def __len__(self) -> int:
        return len(self._fields)

    @overload
    def __getitem__(self, at: int) -> Estimate: ...

    @overload
    def __getitem__(self, at: slice) -> "_Estimates": ...

    def __getitem__(self, at: int | slice) -> "Estimate | _Estimates":
        return _Estimates(self._fields[at]) if isinstance(at, slice) else Estimate(*self._fields[at])


class Decision(NamedTuple):
    """replica: the slot chosen, and why. cached_tokens: of the prompt, those it is expected to find there. By policies
    that make estimates, estimates: of the replicas that are up; chosen: of the one chosen.
    """

    replica: int
    reason: RoutingReason
    cached_tokens: int = 0
    estimates: Sequence[Estimate] = ()
    chosen: Estimate | None = None

    @property
    def cached_by_tier(self) -> Mapping[str, int]:
        """Tokens that are expected in each tier of the replica chosen; empty where the policy does not ask."""
        return self.chosen.cached_tokens if self.chosen is not None else {}


class RoutingPolicy(ABC):
    """reads_index: whether `RoutingView.cached` is wanted. follows_requests: whether what was decided before is, in
    `RoutingView.recent`, `RoutingView.home` and blocks in flight. order: which `RoutingView.order` is.
    """

    reads_index = False
    follows_requests = False
    order: ClassVar[Order] = Order.NONE

    @abstractmethod
    def choose(self, view: RoutingView) -> Decision:
        """One of the replicas that are up, of which there must be one."""

    def key(self, block_hashes: Sequence[BlockHash], cached: Sequence[Mapping[str, int]]) -> BlockHash | None:
        """What is hashed for `Order.RING`; None for a prompt that has nothing to share."""
        return None


def least_loaded(view: RoutingView) -> int:
    """Of equal ones the first."""
    least, found = inf, -1
    for slot, state in enumerate(view.replicas):
        if state.up and (found < 0 or state.load < least):
            least, found = state.load, slot
    assert found >= 0, "a replica is up"
    return found


class RandomChoice(RoutingPolicy):
    """Any that is up, each as likely."""

    order: ClassVar[Order] = Order.RANDOM

    def choose(self, view: RoutingView) -> Decision:
        return Decision(_first_up(view), RoutingReason.RANDOM)


class RoundRobin(RoutingPolicy):
    """One after the other."""

    order: ClassVar[Order] = Order.TURN

    def choose(self, view: RoutingView) -> Decision:
        return Decision(_first_up(view), RoutingReason.TURN)


class LeastLoaded(RoutingPolicy):
    """The one with the least load."""

    def choose(self, view: RoutingView) -> Decision:
        return Decision(least_loaded(view), RoutingReason.LEAST_LOADED)


class ConsistentHashing(RoutingPolicy):
    """Equal beginnings go to the same replica; a prompt without a full block shares nothing and goes to the least
    loaded.

    bound: None, or c > 1: no replica gets a request while its load exceeds c times the mean; the next on the ring
    takes it (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018).
    """

    order: ClassVar[Order] = Order.RING

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
                return Decision(slot, RoutingReason.HASH_NEXT if position else RoutingReason.HASH)
        return Decision(least_loaded(view), RoutingReason.LEAST_LOADED)

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
        slot = -max(scores)[1]
        return Decision(slot, RoutingReason.LONGEST_PREFIX, view.block_size * view.cached[slot].get(POOL, 0))


class ExpectedTtft(RoutingPolicy):
    """The replica with the shortest expected time to first token, where computing counts more than waiting.

    A replica's cost, in seconds: waiting for the prompt tokens in its queue, loading what lower tiers have, and
    computing the rest, at that replica's measured rates (see `EQUAL_RATES`). Computing also delays later requests and
    evicts other blocks, so its seconds are multiplied by ``1 + compute_weight``, and by up to ``spread`` more or less
    where the replica was lately given more or less to compute than the mean, which spreads conversations that begin.

    Replicas within ``tie`` times the whole prompt's computing time of the least cost are equal: the first by consistent
    hashing is taken, so that a cold fleet spreads prefixes stably. The hash key is the first block that no replica has.
    A session stays at its replica while that is equal to the best, what they were given lately left aside.

    Load is bounded: no request goes to a replica that waits longer than another by more than
    ``1.5 * (1 + compute_weight) + tie`` times the time to compute the whole prompt there.
    """

    reads_index = True
    follows_requests = True
    order: ClassVar[Order] = Order.RING

    def __init__(self, *, compute_weight: float = 1.0, spread: float = 0.5, tie: float = 0.03) -> None:
        if min(compute_weight, spread, tie) < 0 or spread > 1:
            raise ConfigError(
                f"compute_weight is {compute_weight}, spread {spread}, tie {tie}: use at least 0, for spread at most 1"
            )
        self._weight = 1.0 + compute_weight
        self._spread = spread
        self._tie = tie

    def key(self, block_hashes: Sequence[BlockHash], cached: Sequence[Mapping[str, int]]) -> BlockHash | None:
        if not block_hashes:
            return None
        known = max((sum(each.values()) for each in cached if each), default=0)
        return block_hashes[min(known, len(block_hashes) - 1)]

    def choose(self, view: RoutingView) -> Decision:
        up = [state for state in view.replicas if state.up]
        rates = [state.prefill_rate for state in up if state.prefill_rate]
        rate = sum(rates) / len(rates) if rates else ASSUMED_RATE
        estimates, plain_costs = self._estimates(view, rate)
        at, reason = self._chosen(view, estimates, plain_costs, self._tie * view.prompt_tokens / rate)
        chosen = Estimate(*estimates[at])
        return Decision(chosen.slot, reason, sum(chosen.cached_tokens.values()), _Estimates(estimates), chosen)

    def _chosen(
        self, view: RoutingView, estimates: Sequence[_EstimateFields], plain_costs: Sequence[float], margin: float
    ) -> tuple[int, RoutingReason]:
        """Which of the estimates is of the replica that is chosen. plain_costs: see `_estimates`."""
        costs = [cost for _, _, _, cost, _, _ in estimates]
        least = min(costs)
        slots = [slot for slot, _, _, _, _, _ in estimates]
        equal = {slots[at]: at for at, cost in enumerate(costs) if cost <= least + margin}
        if view.home in slots:
            home = slots.index(view.home)
            if plain_costs[home] <= min(plain_costs) + margin:
                return home, RoutingReason.LEAST_COST if [*equal.values()] == [home] else RoutingReason.SESSION
        if len(equal) == 1:
            return costs.index(least), RoutingReason.LEAST_COST
        return next((equal[slot] for slot in view.order if slot in equal), costs.index(least)), RoutingReason.TIE

    def _estimates(self, view: RoutingView, mean_rate: float) -> tuple[list[_EstimateFields], list[float]]:
        """Of each replica that is up, and their costs without regard to what they were given lately. It is one loop,
        with what they share before it, as there may be many.
        """
        given = [recent for recent, state in zip(view.recent, view.replicas, strict=True) if state.up]
        mean_recent = sum(given) / len(given)
        prompt_tokens = view.prompt_tokens or 1
        lowest, highest = mean_rate / EQUAL_RATES, mean_rate * EQUAL_RATES
        smoothed = mean_recent + FIRST_PROMPTS * prompt_tokens
        estimates: list[_EstimateFields] = []
        plain_costs: list[float] = []
        for slot, (state, cached, recent) in enumerate(zip(view.replicas, view.cached, view.recent, strict=True)):
            if not state.up:
                continue
            rate = state.prefill_rate or mean_rate
            if lowest <= rate <= highest:
                rate = mean_rate
            waiting, to_compute = state.queued_tokens / rate, prompt_tokens
            cached_tokens: Mapping[str, int] = _NOTHING
            loading: Mapping[str, float] = _NOTHING
            if cached:
                cached_tokens, loading = self._found(view, slot, rate)
                to_compute -= sum(cached_tokens.values())
            computing = to_compute / rate + state.step_seconds
            counted = computing * self._weight
            plain = waiting + counted + sum(loading.values())
            above = (recent - mean_recent) / smoothed
            cost = plain + counted * self._spread * (above if above < 1.0 else 1.0)
            plain_costs.append(plain)
            estimates.append((slot, waiting, computing, cost, loading, cached_tokens))
        return estimates, plain_costs

    def _found(self, view: RoutingView, slot: int, rate: float) -> tuple[Mapping[str, int], Mapping[str, float]]:
        """By tier, the prompt's tokens that replica ``slot`` has there, and the seconds to load them, as far as that is
        faster than to compute them at ``rate``.
        """
        load_rates = view.replicas[slot].load_rates
        left = max(0, view.prompt_tokens - 1)  # one token is always computed
        cached_tokens: dict[str, int] = {}
        loading: dict[str, float] = {}
        for tier, blocks in view.cached[slot].items():
            tokens = min(blocks * view.block_size, left)
            if tier not in (POOL, IN_FLIGHT):
                load_rate = load_rates.get(tier)
                seconds = tokens / load_rate if load_rate else UNMEASURED_LOAD * tokens / rate
                if seconds >= tokens / rate:
                    break  # computing is faster, and so it is from here on
                loading[tier] = seconds
            cached_tokens[tier] = tokens
            left -= tokens
        return cached_tokens, loading


def _first_up(view: RoutingView) -> int:
    return next(slot for slot in view.order if view.replicas[slot].up)
