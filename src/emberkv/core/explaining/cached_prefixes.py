"""Which prefixes a cache holds: the largest, and those that prompts reuse most."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest

from emberkv.core.explaining.explain import decode_tokens
from emberkv.core.explaining.ledger import Entry, Ledger, LedgerView
from emberkv.core.hashing import TOKEN_BYTES, Identity


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A run of cached blocks from a chain's beginning, named by its last block.

    tokens: its length. owner: whose its last block is; "" where that is not known, or where nobody asks for keys.
    hits: prompts that reused all of it. last_hit: when, in the ledger's time; 0 for never.
    """

    identity: Identity
    tokens: int
    owner: str
    places: tuple[str, ...]
    hits: int
    last_hit: float


def largest(ledger: LedgerView, limit: int) -> list[CachedPrefix]:
    """The longest cached prefixes that are no part of a longer one, the longest first."""
    cached = [entry for entry in ledger if entry.loss is None]
    inner = {above.identity for entry in cached if (above := ledger.above(entry)) is not None}
    lengths = _lengths(ledger, cached)
    ends = (entry for entry in cached if entry.identity not in inner)
    chosen = nlargest(limit, ends, key=lambda entry: lengths[entry.identity])
    return [_described(ledger, entry, lengths[entry.identity], entry.hits, entry.last_hit) for entry in chosen]


def hottest(ledger: LedgerView, limit: int) -> list[CachedPrefix]:
    """The prefixes that saved most: hits times tokens. Of prefixes reused equally often, only the longest is told."""
    cached = [entry for entry in ledger if entry.loss is None]
    lengths = _lengths(ledger, cached)
    hits: dict[Identity, int] = {}
    last: dict[Identity, float] = {}
    most_below: dict[Identity, int] = {}
    for entry in sorted(cached, key=lambda entry: lengths[entry.identity], reverse=True):
        total = hits.get(entry.identity, 0) + entry.hits
        latest = max(last.get(entry.identity, 0.0), entry.last_hit)
        hits[entry.identity], last[entry.identity] = total, latest
        if (above := ledger.above(entry)) is not None:
            parent = above.identity
            hits[parent] = hits.get(parent, 0) + total
            last[parent] = max(last.get(parent, 0.0), latest)
            most_below[parent] = max(most_below.get(parent, 0), total)
    reused = (entry for entry in cached if hits[entry.identity] > most_below.get(entry.identity, 0))
    chosen = nlargest(limit, reused, key=lambda entry: hits[entry.identity] * lengths[entry.identity])
    return [
        _described(ledger, entry, lengths[entry.identity], hits[entry.identity], last[entry.identity])
        for entry in chosen
    ]


def path_to(ledger: LedgerView, identity: Identity) -> list[Entry]:
    """The known blocks from a chain's beginning to ``identity``; empty when it is not known."""
    path = []
    entry = ledger.get(identity)
    while entry is not None:
        path.append(entry)
        entry = ledger.above(entry)
    return path[::-1]


def unshared(ledger: Ledger, path: Sequence[Identity]) -> list[Identity]:
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


def first_tokens(ledger: LedgerView, identity: Identity, count: int) -> tuple[int, ...]:
    """The first ``count`` tokens of the chain that leads to ``identity``."""
    encoded = b"".join(entry.tokens for entry in path_to(ledger, identity))
    return decode_tokens(encoded[: count * TOKEN_BYTES])


def _lengths(ledger: LedgerView, entries: Iterable[Entry]) -> dict[Identity, int]:
    """Tokens from a chain's beginning to the end of each of ``entries``, and of what lies before them."""
    lengths: dict[Identity, int] = {}
    for entry in entries:
        climbed: list[Entry] = []
        above: Entry | None = entry
        while above is not None and above.identity not in lengths:
            climbed.append(above)
            above = ledger.above(above)
        length = lengths[above.identity] if above is not None else 0
        for each in reversed(climbed):
            length += len(each.tokens) // TOKEN_BYTES
            lengths[each.identity] = length
    return lengths


def _described(ledger: LedgerView, entry: Entry, tokens: int, hits: int, last_hit: float) -> CachedPrefix:
    places = tuple(ledger.places(entry.identity))
    return CachedPrefix(entry.identity, tokens, _owner(ledger, entry), places, hits, last_hit)


def _owner(ledger: LedgerView, entry: Entry) -> str:
    """Read off the nearest border above; a chain that crosses none is public, or nobody's."""
    climbed: Entry | None = entry
    while climbed is not None:
        border = ledger.border(climbed)
        if border is not None:
            return border.owner
        climbed = ledger.above(climbed)
    return ""
