"""Lower tiers for tests of the core: they know what they have, and a test decides what becomes of each load."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, product

from emberkv.core.hashing import PUBLIC_OWNER, BlockHash, Chain, partial_hash
from emberkv.core.loading import BlockRun, LookupStatus, StoredPartial


@dataclass
class FakeTiers:
    """places: the tier and exactness of each block, of partial ones too. block_seconds: by tier; token_seconds: of
    computing.
    pending: blocks of which a tier cannot tell whether it has them. public: partial blocks of public prefixes.
    """

    places: dict[BlockHash, tuple[str, bool]] = field(default_factory=dict)
    block_seconds: dict[str, float] = field(default_factory=dict)
    token_seconds: float | None = None
    asked: int = 0
    pending: set[BlockHash] = field(default_factory=set)
    public: set[BlockHash] = field(default_factory=set)

    def put(self, block_hashes: Sequence[BlockHash], tier: str = "disk", *, exact: bool = True) -> None:
        self.places.update((block_hash, (tier, exact)) for block_hash in block_hashes)

    def put_partial(self, tokens: Chain, position: int, count: int, tier: str = "disk") -> BlockHash:
        """The first ``count`` tokens of block ``position`` of a chain, as a partial block; its hash."""
        start = position * tokens.block_size
        block_hash = partial_hash(tokens.parent(position), tokens.encoded_slice(start, start + count))
        self.put([block_hash], tier)
        if tokens.owner(position) == PUBLIC_OWNER:
            self.public.add(block_hash)
        return block_hash

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

    def find_partial(self, chain: Chain, position: int, least: int, most: int) -> StoredPartial | None:
        start = position * chain.block_size
        own = chain.parent(position)
        parents = dict.fromkeys((own, chain.unsalted_parent(position)))
        for count, parent in product(range(most, least - 1, -1), parents):
            block_hash = partial_hash(parent, chain.encoded_slice(start, start + count))
            tier, _ = self.places.get(block_hash, ("", False))
            if tier and (parent == own or block_hash in self.public):
                return StoredPartial(tier, block_hash, count, self._seconds(tier, 1), public=parent != own)
        return None

    def _seconds(self, tier: str, count: int) -> float | None:
        each = self.block_seconds.get(tier)
        return None if each is None else each * count

    def recompute_seconds(self, tokens: int) -> float | None:
        return None if self.token_seconds is None else self.token_seconds * tokens
