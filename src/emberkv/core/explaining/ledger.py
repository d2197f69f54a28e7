"""The ledger: what is known of every block that was cached, where it is or why it left; and the prefixes it lists."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import takewhile

from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.explaining.explanation import Loss, LossKind
from emberkv.core.hashing import (
    PUBLIC_OWNER,
    TOKEN_BYTES,
    BlockHash,
    TokenChain,
    decode_tokens,
    encode_tokens,
    token_array,
)
from emberkv.errors import ConfigError

DEFAULT_MAX_BLOCKS = 100_000


@dataclass(slots=True, eq=False)
class Entry:
    """One block. hits: prompts whose reused prefix ended here; last_hit: when the last of them came."""

    block_hash: BlockHash
    parent: BlockHash
    tokens: bytes
    loss: Loss | None = None
    hits: int = 0
    last_hit: float = 0.0


@dataclass(frozen=True, slots=True)
class Border:
    """Where a chain becomes ``owner``'s: above lies the last public block, or the model's root."""

    above: BlockHash
    owner: str


class LedgerView:
    """What is known of blocks, without the blocks that follow each."""

    def __init__(self) -> None:
        self._entries: dict[BlockHash, Entry] = {}
        self._held: dict[str, set[BlockHash]] = {POOL: set()}
        self._borders: dict[BlockHash, Border] = {}  # by the salted parent of the first private block

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._entries

    def get(self, block_hash: BlockHash) -> Entry | None:
        return self._entries.get(block_hash)

    def known(self, block_hash: BlockHash) -> Entry:
        """Raises KeyError for a block that is not known."""
        return self._entries[block_hash]

    def tiers_of(self, block_hash: BlockHash) -> list[str]:
        """The names of the tiers that hold a block, the pool first."""
        return [tier for tier, held in self._held.items() if block_hash in held]

    def above(self, entry: Entry) -> Entry | None:
        """The known block before ``entry``, across the border to what is public."""
        border = self._borders.get(entry.parent)
        return self._entries.get(entry.parent if border is None else border.above)

    def border(self, entry: Entry) -> Border | None:
        """The border that lies just above ``entry``, where one does."""
        return self._borders.get(entry.parent)


class Ledger(LedgerView):
    """Follows the events of the pool and its tiers, and remembers up to ``max_blocks`` blocks.

    Beyond that, what was lost longest ago is forgotten first, then what was learned longest ago. A forgotten block is
    only explained less well: what a prompt hits is not decided here. Times are passed in, in seconds.
    """

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS) -> None:
        if max_blocks < 1:
            raise ConfigError(f"a ledger of {max_blocks} blocks; it must remember at least 1")
        super().__init__()
        self._max_blocks = max_blocks
        self._children: dict[BlockHash, list[BlockHash]] = {}  # sorted by their tokens
        self._lost: dict[BlockHash, None] = {}  # in the order of their loss

    def begin_copy(self) -> tuple[LedgerView, list[BlockHash]]:
        """A view to be filled by `copy_to`, and the blocks that it is to get."""
        view = LedgerView()
        view._held = {tier: set(held) for tier, held in self._held.items()}
        view._borders = dict(self._borders)
        return view, list(self._entries)

    def copy_to(self, view: LedgerView, block_hashes: Iterable[BlockHash]) -> None:
        """Copy what is known of these blocks now; those that are not known any more are left out."""
        for block_hash in block_hashes:
            if (entry := self._entries.get(block_hash)) is not None:
                view._entries[block_hash] = replace(entry)

    def children(self, block_hash: BlockHash) -> Sequence[BlockHash]:
        """The known blocks that follow a block or a root, sorted by their encoded tokens."""
        return self._children.get(block_hash, ())

    def below(self, block_hash: BlockHash) -> list[BlockHash]:
        """The known blocks that follow a block, across the border to what is private."""
        beyond = [parent for parent, border in self._borders.items() if border.above == block_hash]
        return [child for parent in (block_hash, *beyond) for child in self.children(parent)]

    def place_among(self, siblings: Sequence[BlockHash], tokens: bytes) -> int:
        """Where among sorted ``siblings`` a block of ``tokens`` is, or would be."""
        return bisect_left(siblings, tokens, key=lambda block_hash: self._entries[block_hash].tokens)

    def apply(self, event: Event, now: float) -> None:
        """An event of the pool or of a tier below it."""
        if isinstance(event, BlockStored) and event.tier != POOL:
            self.arrived(event.tier, event.block_hashes)
        elif isinstance(event, BlockStored):
            parent = event.parent
            for block_hash, tokens in zip(event.block_hashes, event.tokens, strict=True):
                self._learn(block_hash, parent, tokens)
                self.arrived(POOL, (block_hash,))
                parent = block_hash
        elif isinstance(event, BlockRemoved):
            self.left(event.tier, event.block_hashes, now, LossKind.EVICTED if event.evicted else LossKind.REMOVED)
        elif isinstance(event, AllBlocksCleared):
            self.cleared(event.tier, now)

    def arrived(self, tier: str, block_hashes: Iterable[BlockHash]) -> None:
        """Blocks are in ``tier`` now. Those never seen in the pool are not remembered: their tokens are not known."""
        held = self._held.setdefault(tier, set())
        for block_hash in block_hashes:
            entry = self._entries.get(block_hash)
            if entry is not None:
                held.add(block_hash)
                entry.loss = None
                self._lost.pop(block_hash, None)

    def left(self, tier: str, block_hashes: Iterable[BlockHash], now: float, kind: LossKind = LossKind.EVICTED) -> None:
        """Blocks are no longer in ``tier``; below the pool, whether or not their arrival there was recorded. Where it
        was not, a block that was removed before stays so.
        """
        self._lose(tier, block_hashes, Loss(tier, now, kind))

    def cleared(self, tier: str, now: float) -> None:
        """``tier`` is empty now; only what was known to be there is lost by it."""
        self._lose(tier, tuple(self._held.get(tier, ())), Loss(tier, now, LossKind.CLEARED))

    def removed(self, block_hashes: Sequence[BlockHash], now: float) -> None:
        """Blocks were removed from every tier, whether or not it was recorded already that one no longer holds them.

        What was lost before, in another way, is not lost by this.
        """
        for block_hash in block_hashes:
            tiers = self.tiers_of(block_hash)
            for tier in tiers:
                self._held[tier].discard(block_hash)
            entry = self._entries.get(block_hash)
            if entry is not None and entry.loss is None:
                self._mark(block_hash, Loss(tiers[0] if tiers else POOL, now, LossKind.REMOVED))

    def served(self, chain: TokenChain, hit_blocks: int, now: float) -> None:
        """A prompt reused its first ``hit_blocks`` blocks."""
        count = len(chain.block_hashes)
        first = bisect_left(range(count), True, key=lambda index: chain.owner(index) != PUBLIC_OWNER)
        if first < count:
            above = chain.block_hashes[first - 1] if first else chain.root
            if chain.parent(first) != above:
                self._borders.pop(chain.parent(first), None)
                self._borders[chain.parent(first)] = Border(above, chain.owner(first))
                if len(self._borders) > self._max_blocks:
                    del self._borders[next(iter(self._borders))]
        entry = self._entries.get(chain.block_hashes[hit_blocks - 1]) if hit_blocks else None
        if entry is not None:
            entry.hits += 1
            entry.last_hit = now

    def cached_run(self, chain: TokenChain) -> int:
        """How many leading blocks of ``chain`` are known to be somewhere."""
        for index, block_hash in enumerate(chain.block_hashes):
            entry = self._entries.get(block_hash)
            if entry is None or entry.loss is not None:
                return index
        return len(chain.block_hashes)

    def _learn(self, block_hash: BlockHash, parent: BlockHash, tokens: bytes) -> None:
        if block_hash in self._entries:
            return
        while len(self._entries) >= self._max_blocks:
            self._forget(next(iter(self._lost), None) or next(iter(self._entries)))
        self._entries[block_hash] = Entry(block_hash, parent, tokens)
        siblings = self._children.setdefault(parent, [])
        siblings.insert(self.place_among(siblings, tokens), block_hash)

    def _forget(self, block_hash: BlockHash) -> None:
        entry = self._entries[block_hash]
        siblings = self._children[entry.parent]
        del siblings[self.place_among(siblings, entry.tokens)]
        if not siblings:
            del self._children[entry.parent]
        del self._entries[block_hash]
        self._lost.pop(block_hash, None)
        for held in self._held.values():
            held.discard(block_hash)

    def _lose(self, tier: str, block_hashes: Iterable[BlockHash], loss: Loss) -> None:
        held = self._held.setdefault(tier, set())
        for block_hash in block_hashes:
            if block_hash not in held and (tier == POOL or self._was_removed(block_hash)):
                continue
            held.discard(block_hash)
            if block_hash in self._entries and not any(block_hash in other for other in self._held.values()):
                self._mark(block_hash, loss)

    def _was_removed(self, block_hash: BlockHash) -> bool:
        entry = self._entries.get(block_hash)
        return entry is not None and entry.loss is not None and entry.loss.kind is LossKind.REMOVED

    def _mark(self, block_hash: BlockHash, loss: Loss) -> None:
        self._entries[block_hash].loss = loss
        self._lost.pop(block_hash, None)
        self._lost[block_hash] = None


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A run of cached blocks from a chain's beginning, named by its last block.

    tokens: its length. owner: the tenant of its last block; "" where that is not known, or where there are no tenants.
    hits: prompts that reused all of it. last_hit: when, in the ledger's time; 0 for never.
    """

    block_hash: BlockHash
    tokens: int
    owner: str
    tiers: tuple[str, ...]
    hits: int
    last_hit: float


def largest(ledger: LedgerView, limit: int) -> list[CachedPrefix]:
    """The longest cached prefixes that are no part of a longer one, the longest first."""
    cached = [entry for entry in ledger if entry.loss is None]
    inner = {above.block_hash for entry in cached if (above := ledger.above(entry)) is not None}
    lengths = _lengths(ledger, cached)
    ends = (entry for entry in cached if entry.block_hash not in inner)
    chosen = nlargest(limit, ends, key=lambda entry: lengths[entry.block_hash])
    return [_described(ledger, entry, lengths[entry.block_hash], entry.hits, entry.last_hit) for entry in chosen]


def hottest(ledger: LedgerView, limit: int) -> list[CachedPrefix]:
    """The prefixes that saved most: hits times tokens. Of prefixes reused equally often, only the longest is listed."""
    cached = [entry for entry in ledger if entry.loss is None]
    lengths = _lengths(ledger, cached)
    hits: dict[BlockHash, int] = {}
    last: dict[BlockHash, float] = {}
    most_below: dict[BlockHash, int] = {}
    for entry in sorted(cached, key=lambda entry: lengths[entry.block_hash], reverse=True):
        total = hits.get(entry.block_hash, 0) + entry.hits
        latest = max(last.get(entry.block_hash, 0.0), entry.last_hit)
        hits[entry.block_hash], last[entry.block_hash] = total, latest
        if (above := ledger.above(entry)) is not None:
            parent = above.block_hash
            hits[parent] = hits.get(parent, 0) + total
            last[parent] = max(last.get(parent, 0.0), latest)
            most_below[parent] = max(most_below.get(parent, 0), total)
    reused = (entry for entry in cached if hits[entry.block_hash] > most_below.get(entry.block_hash, 0))
    chosen = nlargest(limit, reused, key=lambda entry: hits[entry.block_hash] * lengths[entry.block_hash])
    return [
        _described(ledger, entry, lengths[entry.block_hash], hits[entry.block_hash], last[entry.block_hash])
        for entry in chosen
    ]


def path_to(ledger: LedgerView, block_hash: BlockHash) -> list[Entry]:
    """The known blocks from a chain's beginning to ``block_hash``; empty when it is not known."""
    path = []
    entry = ledger.get(block_hash)
    while entry is not None:
        path.append(entry)
        entry = ledger.above(entry)
    return path[::-1]


def unshared(ledger: Ledger, path: Sequence[BlockHash]) -> list[BlockHash]:
    """Of a chain's blocks and all known ones below them, those that no other known chain needs."""
    if not path:
        return []
    gone = _with_all_below(ledger, path[-1:])
    for index in range(len(path) - 2, -1, -1):
        if any(child != path[index + 1] for child in ledger.below(path[index])):
            break
        gone.append(path[index])
    return gone


def beginning_with(ledger: Ledger, parent: BlockHash, tokens: Sequence[int]) -> list[BlockHash]:
    """The known blocks behind ``parent`` that begin with ``tokens``, which fill none, and all known ones below them."""
    beginning = encode_tokens(token_array(tokens))
    siblings = ledger.children(parent)
    first = ledger.place_among(siblings, beginning)
    following = takewhile(lambda child: ledger.known(child).tokens.startswith(beginning), siblings[first:])
    return _with_all_below(ledger, list(following))


def _with_all_below(ledger: Ledger, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
    found = list(block_hashes)
    at = 0
    while at < len(found):
        found += ledger.below(found[at])
        at += 1
    return found


def first_tokens(ledger: LedgerView, block_hash: BlockHash, count: int) -> tuple[int, ...]:
    """The first ``count`` tokens of the chain that leads to ``block_hash``."""
    encoded = b"".join(entry.tokens for entry in path_to(ledger, block_hash))
    return decode_tokens(encoded[: count * TOKEN_BYTES])


def _lengths(ledger: LedgerView, entries: Iterable[Entry]) -> dict[BlockHash, int]:
    """Tokens from a chain's beginning to the end of each of ``entries``, and of what lies before them."""
    lengths: dict[BlockHash, int] = {}
    for entry in entries:
        climbed: list[Entry] = []
        above: Entry | None = entry
        while above is not None and above.block_hash not in lengths:
            climbed.append(above)
            above = ledger.above(above)
        length = lengths[above.block_hash] if above is not None else 0
        for each in reversed(climbed):
            length += len(each.tokens) // TOKEN_BYTES
            lengths[each.block_hash] = length
    return lengths


def _described(ledger: LedgerView, entry: Entry, tokens: int, hits: int, last_hit: float) -> CachedPrefix:
    tiers = tuple(ledger.tiers_of(entry.block_hash))
    return CachedPrefix(entry.block_hash, tokens, _owner(ledger, entry), tiers, hits, last_hit)


def _owner(ledger: LedgerView, entry: Entry) -> str:
    """Read off the nearest border above; a chain that crosses none is public, or has no owner."""
    climbed: Entry | None = entry
    while climbed is not None:
        border = ledger.border(climbed)
        if border is not None:
            return border.owner
        climbed = ledger.above(climbed)
    return ""
