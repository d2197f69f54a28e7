"""Lower tiers for tests of the core: they know what they have, and a test decides what becomes of each load."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from emberkv.core.hashing import BlockHash
from emberkv.core.loading import BlockRun, LookupStatus


@dataclass
class FakeTiers:
    """places: the tier and exactness of each block. block_seconds: by tier; token_seconds: of computing.
    pending: blocks of which a tier cannot tell whether it has them.
    """

    places: dict[BlockHash, tuple[str, bool]] = field(default_factory=dict)
    block_seconds: dict[str, float] = field(default_factory=dict)
    token_seconds: float | None = None
    asked: int = 0
    pending: set[BlockHash] = field(default_factory=set)

    def put(self, block_hashes: Sequence[BlockHash], tier: str = "disk", *, exact: bool = True) -> None:
        self.places.update((block_hash, (tier, exact)) for block_hash in block_hashes)

    def find(self, block_hashes: Sequence[BlockHash], *, exact: bool) -> list[BlockRun]:
        self.asked += 1
        found = []
        for block_hash in block_hashes:
            tier, is_exact = self.places.get(block_hash, ("", False))
            if not tier or (exact and not is_exact):
                break
            found.append(tier)
        runs = [(tier, len(list(blocks))) for tier, blocks in groupby(found)]
        return [BlockRun(tier, count, self._seconds(tier, count)) for tier, count in runs]

    def status(self, block_hash: BlockHash, *, exact: bool) -> LookupStatus:
        return LookupStatus.PENDING if block_hash in self.pending else LookupStatus.MISS

    def _seconds(self, tier: str, count: int) -> float | None:
        each = self.block_seconds.get(tier)
        return None if each is None else each * count

    def recompute_seconds(self, tokens: int) -> float | None:
        return None if self.token_seconds is None else self.token_seconds * tokens
