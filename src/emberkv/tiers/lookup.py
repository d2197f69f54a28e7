"""Where blocks are: a look into the memory of all tiers, fastest first, never at a disk."""

from collections.abc import Sequence
from typing import Protocol

from emberkv.core.promotion import Run
from emberkv.tiers.meter import TierMeter


class Searched(Protocol):
    """The part of a tier that is looked into; a simulated tier has no more."""

    @property
    def name(self) -> str: ...

    def lookup(self, identities: Sequence[bytes], *, exact: bool = False) -> int: ...


def find_runs(
    tiers: Sequence[Searched],
    meters: Sequence[TierMeter],
    identities: Sequence[bytes],
    *,
    exact: bool,
    counted: bool = True,
) -> list[Run]:
    """The longest consecutive run from the first identity on, each block from the fastest tier that has it.

    Counts a hit for that tier, and a miss for the faster ones; where nobody has a block, a miss for all, as for those
    after it. counted: False where nobody is served, so that the meters are only asked how long loads take.
    """
    runs: list[Run] = []
    position = 0
    while position < len(identities):
        rank, count = _first_run(tiers, identities[position:], exact)
        if counted:
            _count(meters, rank, count)
        if rank == len(tiers):
            break
        runs.append(Run(tiers[rank].name, count, meters[rank].seconds_for(count)))
        position += count
    return runs


def _count(meters: Sequence[TierMeter], rank: int, count: int) -> None:
    for meter in meters[:rank]:
        meter.looked_up(0, count)
    if rank < len(meters):
        meters[rank].looked_up(count, 0)


def _first_run(tiers: Sequence[Searched], identities: Sequence[bytes], exact: bool) -> tuple[int, int]:
    """The rank of the fastest tier with the first block, and the blocks it has before a faster one has the next.

    All blocks, under the rank after the last, where no tier has the first.
    """
    for rank, tier in enumerate(tiers):
        count = tier.lookup(identities, exact=exact)
        if count:
            faster = tiers[:rank]
            later = range(1, count) if faster else ()
            ends = (at for at in later if any(each.lookup(identities[at : at + 1], exact=exact) for each in faster))
            return rank, next(ends, count)
    return len(tiers), len(identities)
