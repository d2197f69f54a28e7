"""The size half of a plan: what a cache of each size finds of a workload, and which size is enough."""

from dataclasses import dataclass, field

from emberkv.sim.build import Machine
from emberkv.sim.curves.lru import LRUCurve
from emberkv.sim.curves.optimal import Optimal
from emberkv.sim.curves.replayed import SampledReplay, replay
from emberkv.sim.curves.visits import Hits, Visit

REPLAYED = 60_000
"""Block references up to which another policy than LRU is replayed whole; of more, a sample of about as many."""


@dataclass(frozen=True, slots=True)
class SizePoint:
    """A cache of ``bytes``. Rates are shares of all prompt tokens: found by the policy, and by the best possible."""

    bytes: int
    blocks: int
    hit_rate: float
    best_possible: float


def round_sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two and one and a half times those, in bytes, from ``smallest`` up to the first that is no less than
    ``largest``.
    """
    sizes: list[int] = []
    power = 2
    while not sizes or sizes[-1] < largest:
        sizes += [size for size in (power, power + power // 2) if size >= smallest]
        power *= 2
    return [size for size in sizes if size < largest] + [min(size for size in sizes if size >= largest)]


@dataclass
class Capacities:
    """Hit rates of a workload's visits under one policy. error: of all of them; None: they are exact."""

    visits: list[Visit]
    policy: str
    machine: Machine
    error: float | None = None
    lru: LRUCurve = field(init=False)
    _sample: SampledReplay | None = field(init=False, default=None)
    _known: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lru = LRUCurve(self.visits)
        if self.policy != "lru" and self.lru.asked > REPLAYED:
            self._sample = SampledReplay(self.visits, self.lru, REPLAYED / self.lru.asked)

    @property
    def unlimited(self) -> float:
        return self.lru.unlimited.token_rate

    @property
    def enough(self) -> int:
        """Bytes that find under LRU what a cache without limit finds."""
        return self.lru.enough * self.machine.block_bytes

    def hit_rate(self, capacity: int) -> float:
        """Share of prompt tokens that so many blocks find; requests that are larger are refused."""
        if capacity not in self._known:
            self._known[capacity] = self._hits(capacity).token_rate
        return self._known[capacity]

    def _hits(self, capacity: int) -> Hits:
        if capacity >= self.lru.smallest:
            if self.policy == "lru":
                return self.lru.at(capacity)
            if self._sample is not None:
                (hits,), error = self._sample.curve([capacity], self.policy, block_cost=self.machine.block_cost)
                self.error = max(error, self.error or 0.0)
                return hits
        return replay(self.visits, capacity, self.policy, block_cost=self.machine.block_cost)

    def sizes(self) -> list[SizePoint]:
        """At round sizes, from one that takes the largest request to one beyond which nothing changes."""
        block, best = self.machine.block_bytes, Optimal(self.visits)
        points = []
        for size in round_sizes(self.lru.smallest * block, self.enough):
            blocks = size // block
            points.append(SizePoint(size, blocks, self.hit_rate(blocks), best.at(blocks).token_rate))
        return points
