"""The cached blocks of a pool: found under their identities, compared by their tokens, evicted in a policy's order."""

from collections.abc import Callable, Iterable

from emberkv.core.block import Block
from emberkv.core.events import BlockRemoved, BlockStored, EventLog, Snapshot
from emberkv.core.hashing import Chain, Identity, common_tokens, encode_tokens, tail_identity, token_array
from emberkv.core.matching import Match, MatchEnd
from emberkv.core.policies.eviction_policy import EvictionPolicy, Weight
from emberkv.core.stats import CacheStats

BlockWeight = Callable[[int], Weight]
"""The eviction weight of a block at a position in its chain."""


def uniform_weight(position: int) -> Weight:
    """Every block alike."""
    return Weight()


class CachedBlocks:
    """Which block is found under which identity. Who holds a block, and where blank ones wait, is the pool's business.

    policy: knows every block that is found, as held or as released. journal: keep a list of what was committed.
    """

    def __init__(
        self,
        policy: EvictionPolicy[Identity],
        weight: BlockWeight,
        events: EventLog,
        stats: CacheStats,
        *,
        journal: bool,
    ) -> None:
        self.policy = policy
        self.weight = weight
        self.index: dict[Identity, Block] = {}
        self._tails: dict[Identity, set[Identity]] = {}  # those of partial blocks, by the block that they are behind
        self._num_tails = 0
        self._events = events
        self._stats = stats
        self._journal: dict[Identity, Block] | None = {} if journal else None

    @property
    def num_full(self) -> int:
        return len(self.index) - self._num_tails

    def match(self, chain: Chain, start: int, stop: int, *, exact_only: bool) -> Match:
        """See `BlockPool.match`."""
        index = self.index
        identities = chain.identities
        found: list[Block] = []
        for position in range(start, stop):
            block = index.get(identities[position])
            if block is None:
                return Match(found, MatchEnd.ABSENT)
            if block.tokens != chain.block_tokens(position):
                self._stats.collisions += 1
                return Match(found, MatchEnd.TOKENS_DIFFER)
            if exact_only and not block.exact:
                return Match(found, MatchEnd.INEXACT)
            found.append(block)
        return Match(found, MatchEnd.LIMIT)

    def find_tail(self, chain: Chain, position: int) -> tuple[Block, int] | None:
        """See `BlockPool.find_tail`."""
        block = self.known_tail(chain, position)
        if block is None:
            return None
        start = position * chain.block_size
        common = common_tokens(block.tokens, encoded_slice(chain, start, min(start + chain.block_size, len(chain) - 1)))
        return (block, common) if common else None

    def enter(self, block: Block, chain: Chain, position: int, *, exact: bool, in_place: bool) -> None:
        """Make a held block visible. in_place: of another one that was visible under the same identity just now."""
        identity = chain.identities[position]
        block.tokens = chain.block_tokens(position)
        self._enter(block, identity, chain, position, exact=exact)
        self._stats.committed_blocks += 1
        if not in_place:
            self._events.append(BlockStored((identity,), block.parent, (block.tokens,), chain.block_size))

    def known_tail(self, chain: Chain, position: int) -> Block | None:
        return self.index.get(tail_identity(chain.parent(position)))

    def enter_tail(self, block: Block, chain: Chain, position: int, tokens: bytes) -> None:
        """Make a held block visible that has these tokens; there must be no other one behind the same block.

        Nobody is told, and the block goes without notice: who mirrors the cache mirrors full blocks.
        """
        identity = tail_identity(chain.parent(position))
        block.tokens = tokens
        block.partial = True
        self._enter(block, identity, chain, position, exact=True)
        if position:
            block.parent = chain.identities[position - 1]  # unsalted, as whoever has it forgotten knows it
        self._tails.setdefault(block.parent, set()).add(identity)
        self._num_tails += 1

    def _enter(self, block: Block, identity: Identity, chain: Chain, position: int, *, exact: bool) -> None:
        block.identity = identity
        block.parent = chain.parent(position)
        block.position = position
        block.owner = chain.owner(position)
        block.exact = exact
        self.index[identity] = block
        weight = self.weight(position)
        self.policy.admit(identity, Weight(weight.size, weight.cost, block.owner) if block.owner else weight)

    def leave(self, block: Block) -> None:
        """A block is not found any more, without having been evicted."""
        assert block.identity is not None
        del self.index[block.identity]
        if block.ref_count:
            self.policy.forget(block.identity)
        else:
            self.policy.discard(block.identity)
        self._wipe(block)

    def evict(self, count: int, owner: str) -> list[Block]:
        """The blocks that make room for ``count`` of ``owner``; the policy must have as many for it."""
        return self._evicted([self.policy.evict_for(owner) for _ in range(count)])

    def evict_surplus(self) -> list[Block]:
        """The blocks that a quota forbids to keep."""
        surplus = list(self.policy.surplus())
        for identity in surplus:
            self.policy.discard(identity)
        return self._evicted(surplus) if surplus else []

    def _evicted(self, identities: list[Identity]) -> list[Block]:
        blocks = [self.index.pop(identity) for identity in identities]
        full = tuple(identity for identity, block in zip(identities, blocks, strict=True) if not block.partial)
        for block in blocks:
            self._wipe(block)
        self._stats.evicted_blocks += len(full)
        if full:
            self._events.append(BlockRemoved(full))
        return blocks

    def write_down(self, block: Block) -> None:
        """Keep for `take_committed`, if there is a journal."""
        if self._journal is not None and block.identity is not None:
            self._journal[block.identity] = block

    def take_committed(self) -> list[Block]:
        """See `BlockPool.take_committed`."""
        if not self._journal:
            return []
        committed, self._journal = self._journal, {}
        return [block for identity, block in committed.items() if self.index.get(identity) is block]

    def among(self, identities: Iterable[Identity]) -> list[Block]:
        """The blocks that are found under any of these, each once, and the partial ones behind these."""
        wanted = dict.fromkeys(key for each in identities for key in (each, *self._tails.get(each, ())))
        return [self.index[identity] for identity in wanted if identity in self.index]

    def snapshot(self) -> Snapshot:
        parents = {identity: block.parent for identity, block in self.index.items() if not block.partial}
        return Snapshot(self._events.last_sequence, parents)

    def _wipe(self, block: Block) -> None:
        if block.partial and block.identity is not None:
            tails = self._tails[block.parent]
            tails.discard(block.identity)
            self._num_tails -= 1
            if not tails:
                del self._tails[block.parent]
        block.identity = None
        block.parent = b""
        block.tokens = b""
        block.exact = False
        block.partial = False


def encoded_slice(chain: Chain, start: int, stop: int) -> bytes:
    """Tokens ``[start, stop)`` of a chain, encoded."""
    return encode_tokens(token_array(chain.slice(start, stop)))
