"""What every tier is: a place for opaque bytes by identity, asked in batches only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from emberkv.core.policies.eviction_policy import EvictionPolicy
from emberkv.tiers.stats import TierStats

PolicyFactory = Callable[[], EvictionPolicy[Any]]
"""Makes the order in which a tier gives up its blocks; called again when the tier is cleared."""


@dataclass(frozen=True, slots=True)
class TierEntry:
    """A block as a tier keeps it. owner: whose books it is on; "" where nobody told. exact: see `BlockRecord`."""

    identity: bytes
    owner: str
    data: bytes
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """What came of a store. count: of the entries given, those that the tier now has. evicted: what had to go."""

    count: int = 0
    evicted: list[bytes] = field(default_factory=list)


class Tier(Protocol):
    """All verbs may be called from any thread. Failures of the place itself are counted in ``stats``, never raised.

    Recency: what is stored, loaded or touched becomes the most recent, the first of a batch most of all, because a
    block is of no use without those before it.
    """

    name: str

    def lookup(self, identities: Sequence[bytes], *, exact: bool = False) -> int:
        """How many of the first identities it has, in one run. Memory only, never I/O. exact: count only such."""

    def load(self, identities: Sequence[bytes]) -> list[TierEntry | None]:
        """What was stored, unverified; None where it is not here or cannot be read."""

    def touch(self, identities: Sequence[bytes]) -> None:
        """These were used elsewhere: as recent as if they had been loaded."""

    def store(self, entries: Sequence[TierEntry]) -> Stored:
        """Keep what is not here yet; an exact entry replaces one that is not. Evicts until it fits."""

    def remove(self, identities: Sequence[bytes]) -> int:
        """Drop these; how many were there."""

    def clear(self) -> int:
        """Drop all that ``lookup`` could find; how many there were."""

    def stats(self) -> TierStats:
        """What it holds and what went wrong; the traffic is the stack's to count."""

    def close(self) -> None:
        """Give back what the tier holds open. What it stores stays."""
