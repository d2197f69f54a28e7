"""Which prefixes a cache holds: the largest, and those that prompts reuse most."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest

from emberkv.core.explaining.ledger import Entry, Ledger, LedgerView
from emberkv.core.hashing import TOKEN_BYTES, BlockHash, decode_tokens


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A run of cached blocks from a chain's beginning, named by its last block.

    tokens: its length. owner: the tenant of its last block; "" where that is not known, or where there are no tenants.
    hits: prompts that reused all of it. last_hit: when, in the ledger's time; 0 for never.
    """

    block_hash: BlockHash
    tokens: int
    owner: str
    places: tuple[str, ...]
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
    gone = list(path[-1:])
    at = 0
    while at < len(gone):
        gone += ledger.below(gone[at])
        at += 1
    for index in range(len(path) - 2, -1, -1):
        if any(child != path[index + 1] for child in ledger.below(path[index])):
            break
        gone.append(path[index])
    return gone


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
    places = tuple(ledger.places(entry.block_hash))
    return CachedPrefix(entry.block_hash, tokens, _owner(ledger, entry), places, hits, last_hit)


def _owner(ledger: LedgerView, entry: Entry) -> str:
    """Read off the nearest border above; a chain that crosses none is public, or has no owner."""
    climbed: Entry | None = entry
    while climbed is not None:
        border = ledger.border(climbed)
        if border is not None:
            return border.owner
        climbed = ledger.above(climbed)
    return ""
