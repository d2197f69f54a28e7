"""Lower tiers for tests of the core: they know what they have, and a test decides what becomes of each load."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from emberkv.core.hashing import Identity
from emberkv.core.promotion import LookupStatus, Run


@dataclass
class FakeTiers:
    """places: the tier and exactness of each block. block_seconds: by tier; token_seconds: of computing.
    pending: blocks of which a tier cannot tell whether it has them.
    """

    places: dict[Identity, tuple[str, bool]] = field(default_factory=dict)
    block_seconds: dict[str, float] = field(default_factory=dict)
    token_seconds: float | None = None
    asked: int = 0
    pending: set[Identity] = field(default_factory=set)

    def put(self, identities: Sequence[Identity], tier: str = "disk", *, exact: bool = True) -> None:
        self.places.update((identity, (tier, exact)) for identity in identities)

    def find(self, identities: Sequence[Identity], *, exact: bool) -> list[Run]:
        self.asked += 1
        found = []
        for identity in identities:
            tier, is_exact = self.places.get(identity, ("", False))
            if not tier or (exact and not is_exact):
                break
            found.append(tier)
        runs = [(tier, len(list(blocks))) for tier, blocks in groupby(found)]
        return [Run(tier, count, self._seconds(tier, count)) for tier, count in runs]

    def status(self, identity: Identity, *, exact: bool) -> LookupStatus:
        return LookupStatus.PENDING if identity in self.pending else LookupStatus.MISS

    def _seconds(self, tier: str, count: int) -> float | None:
        each = self.block_seconds.get(tier)
        return None if each is None else each * count

    def recompute_seconds(self, tokens: int) -> float | None:
        return None if self.token_seconds is None else self.token_seconds * tokens
