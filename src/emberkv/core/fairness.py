"""Fair sharing of an engine between tenants: which tenant's turn it is, and what part of the engine each may claim.

Turns follow virtual token counters ("Fairness in Serving Large Language Models", Sheng et al., OSDI 2024): each tenant
has a counter of the tokens computed for it, divided by its weight, and the lowest counter is served next. A tenant that
comes back from idleness starts at the counter served last, as in start-time fair queueing (Goyal et al., SIGCOMM 1996),
so that idleness earns no credit.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from emberkv.core.sequence import Sequence
from emberkv.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class TokenCounters(Generic[K]):
    """One virtual token counter for each key. weights: by key, above 0; 1 for all others. Raises ConfigError."""

    def __init__(self, weights: Mapping[K, float] | None = None) -> None:
        self._weights = dict(weights or {})
        for key, weight in self._weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"the weight of {key!r} is {weight}; it must be a finite number above 0")
        self._counters: dict[K, float] = {}
        self._served = 0.0

    def weight(self, key: K) -> float:
        return self._weights.get(key, 1.0)

    def __getitem__(self, key: K) -> float:
        """Tokens computed for ``key``, divided by its weight, with what it missed by being idle added."""
        return self._counters.get(key, self._served)

    def activate(self, key: K) -> None:
        """``key`` has work again after having had none."""
        self._counters[key] = max(self[key], self._served)

    def serve(self, key: K, tokens: int) -> None:
        """It was ``key``'s turn, and ``tokens`` are computed for it."""
        counter = self._counters.get(key, self._served)
        self._served = max(self._served, counter)
        self._counters[key] = counter + tokens / self._weights.get(key, 1.0)

    def charge(self, key: K, tokens: int) -> None:
        """``tokens`` are computed for ``key`` outside its turns."""
        self._counters[key] = self._counters.get(key, self._served) + tokens / self._weights.get(key, 1.0)


@dataclass(slots=True)
class Usage:
    """What running sequences occupy."""

    sequences: int = 0
    blocks: int = 0


@dataclass(slots=True)
class Claims:
    """What each tenant occupies, beside its share of the running sequences and of the pool's blocks.

    A tenant's share is its weight's part of all weights of the tenants that are present, and one sequence at least.
    max_sequences, num_blocks: what is shared out. weights: of the tenants present.
    """

    max_sequences: int
    num_blocks: int
    weights: Mapping[str, float]
    usage: dict[str, Usage] = field(default_factory=dict)

    @classmethod
    def of(
        cls, running: Iterable[Sequence], weights: Mapping[str, float], *, max_sequences: int, num_blocks: int
    ) -> "Claims":
        claims = cls(max_sequences, num_blocks, weights)
        for sequence in running:
            usage = claims.usage.setdefault(sequence.tenant, Usage())
            usage.sequences += 1
            usage.blocks += len(sequence.held.blocks)
        return claims

    def remove(self, sequence: Sequence) -> None:
        """``sequence``, which still holds its blocks, is about to stop running."""
        usage = self.usage[sequence.tenant]
        usage.sequences -= 1
        usage.blocks -= len(sequence.held.blocks)

    def blocks(self, tenant: str) -> int:
        return self.usage[tenant].blocks if tenant in self.usage else 0

    def load(self, tenant: str) -> float:
        """Blocks occupied, by weight."""
        return self.blocks(tenant) / self.weights.get(tenant, 1.0)

    def excess_sequences(self, tenant: str) -> float:
        """Running sequences above the tenant's share; negative below it."""
        running = self.usage[tenant].sequences if tenant in self.usage else 0
        return running - max(1.0, self.max_sequences * self._part(tenant))

    def excess_blocks(self, tenant: str) -> float:
        """Blocks above the tenant's share; negative below it."""
        return self.blocks(tenant) - self.num_blocks * self._part(tenant)

    def _part(self, tenant: str) -> float:
        return self.weights[tenant] / sum(self.weights.values())
