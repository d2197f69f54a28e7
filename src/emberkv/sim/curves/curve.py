"""Hit rate against capacity as a table: LRU and the upper bound, at capacities that show the shape."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from emberkv.sim.build import root_of
from emberkv.sim.curves.accesses import Hits, accesses
from emberkv.sim.curves.lru import LRUCurve
from emberkv.sim.curves.optimal import Optimal
from emberkv.sim.run import Results
from emberkv.workload.files import ASSUMED
from emberkv.workload.request import Request
from emberkv.workload.source import Source, unroll

MOST_REQUESTS = 100_000
"""Of a workload, from its start, that a curve is made from; their blocks are kept in memory."""

POINTS = 24


@dataclass(frozen=True)
class CapacityCurve:
    """lru: exact at every capacity. best: the bound at `capacities`. requests: how many it was made from."""

    lru: LRUCurve
    best: list[Hits]
    capacities: list[int]
    requests: int


def first_requests(source: Source) -> Iterable[Request]:
    """In the order of arrival. Generated follow-ups wait for answers, which are assumed to take a time."""
    requests = unroll(source, first_token=ASSUMED.first_token, per_token=ASSUMED.per_token)
    return islice(requests, MOST_REQUESTS)


def spaced(smallest: int, largest: int, count: int = POINTS) -> list[int]:
    """At most ``count`` whole numbers from ``smallest`` to ``largest``, evenly on a logarithmic axis."""
    ratio = (largest / smallest) ** (1 / max(1, count - 1))
    return sorted({min(largest, round(smallest * ratio**step)) for step in range(count)} | {largest})


def capacity_curve(run: Results) -> CapacityCurve | None:
    """Of a run's workload, from the smallest capacity that takes every request to that which is as good as unlimited.

    None without requests. Raises WorkloadError while the workload is read.
    """
    size = run.machine.block_size
    seen = list(accesses(first_requests(run.workload.source()), size, root_of(run.config, size)))
    if not seen:
        return None
    lru, best = LRUCurve(seen), Optimal(seen)
    capacities = spaced(lru.smallest, lru.enough)
    return CapacityCurve(lru, [best.at(capacity) for capacity in capacities], capacities, len(seen))
