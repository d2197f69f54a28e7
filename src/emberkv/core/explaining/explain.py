"""Explains a prompt from the ledger: why the tokens that were not found were not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from emberkv.core.explaining.explanation import POOL, Divergence, Explanation, Loss, LossKind, Miss, Outcome, Reason
from emberkv.core.explaining.ledger import Entry, Ledger
from emberkv.core.hashing import TOKEN_BYTES, Identity, TokenChain, common_tokens
from emberkv.core.matching import MatchEnd
from emberkv.core.promotion import Admission

K = TypeVar("K")

SHOWN_TOKENS = 24
"""Tokens told on either side of a divergence."""
COMPARED_SIBLINGS = 64
"""How many equally near blocks, on either side, are asked whether they are still cached."""


REFUSED = {MatchEnd.INEXACT: Reason.INEXACT, MatchEnd.TOKENS_DIFFER: Reason.COLLISION}
"""Why a search ended at a block that is there."""

_LOST = {LossKind.EVICTED: Reason.EVICTED, LossKind.REMOVED: Reason.REMOVED, LossKind.CLEARED: Reason.CLEARED}


def admission_outcome(admission: Admission, prompt_tokens: int) -> Outcome:
    """What an admission found of a prompt."""
    if admission.end is MatchEnd.OFF:
        return Outcome(set_aside={Reason.CACHE_OFF: prompt_tokens})
    hit = {POOL: admission.pool_tokens, **admission.tier_tokens}
    set_aside = {
        Reason.ALIGNMENT: admission.alignment_tokens,
        Reason.RECOMPUTE_CHEAPER: admission.recompute_cheaper_tokens,
        Reason.LOAD_FAILED: admission.load_failed_tokens,
    }
    return Outcome(_some(hit), _some(set_aside), REFUSED.get(admission.end))


def explain(
    ledger: Ledger, chain: TokenChain, outcome: Outcome, *, alignment: int, prompt_tokens: int | None = None
) -> Explanation:
    """Account for every token of a prompt, of which ``outcome`` was found.

    chain: begins with the prompt. prompt_tokens: the prompt's length; None: it is all of the chain. alignment: tokens
    of the unit in which state can be reused.
    """
    size = chain.block_size
    length = len(chain) if prompt_tokens is None else prompt_tokens
    misses: list[Miss] = []
    at = sum(outcome.hit.values())
    for reason, tokens in outcome.set_aside.items():
        misses.append(Miss(reason, at, min(tokens, length - at)))
        at = misses[-1].stop
    divergence = None
    if length <= alignment and not outcome.hit:
        misses.append(Miss(Reason.TOO_SHORT, at, length - at))
    else:
        stop = max(at, (length - 1) // size * size)
        rest, divergence = _behind(at, *_rest(ledger, chain, at // size, length, outcome.refused))
        misses += [*rest, Miss(Reason.PARTIAL, stop, length - stop)]
    kept = tuple(miss for miss in misses if miss.tokens)
    return Explanation(length, dict(outcome.hit), kept, divergence)


def _behind(at: int, misses: Sequence[Miss], divergence: Divergence | None) -> tuple[list[Miss], Divergence | None]:
    """What is left of these from token ``at`` on, where a hit may end within a block.

    A partial block is in no ledger. If it went on with the prompt's tokens where known ones differ, nothing known does.
    """
    left = [replace(miss, start=(start := max(at, miss.start)), tokens=max(0, miss.stop - start)) for miss in misses]
    if divergence is None or divergence.position >= at:
        return left, divergence
    return [replace(miss, reason=Reason.NEW) if miss.reason is Reason.DIVERGED else miss for miss in left], None


def _some(counts: dict[K, int]) -> dict[K, int]:
    return {key: count for key, count in counts.items() if count}


def _rest(
    ledger: Ledger, chain: TokenChain, first: int, length: int, refused: Reason | None
) -> tuple[list[Miss], Divergence | None]:
    """What became of the prompt's blocks from ``first`` to the last full one: a run that is known, then what is not."""
    size = chain.block_size
    stop = max(first, (length - 1) // size)
    known = first
    while known < stop and chain.identities[known] in ledger:
        known += 1
    misses = []
    if known > first and refused is not None:
        misses.append(Miss(refused, first * size, (known - first) * size, ledger.known(chain.identities[first]).loss))
    elif known > first:
        misses += _losses(ledger, chain, first, known)
    if known == stop:
        return misses, None
    divergence = _divergence(ledger, chain, known, length)
    reason = Reason.NEW if divergence is None else Reason.DIVERGED
    misses.append(Miss(reason, known * size, (stop - known) * size))
    return misses, divergence


def _losses(ledger: Ledger, chain: TokenChain, first: int, stop: int) -> Iterator[Miss]:
    """Known blocks ``[first, stop)``, the first of which is gone: a miss for each run of them that went in one way.

    What is still cached behind a lost block is of no use without it, and counts with it.
    """
    size = chain.block_size
    start, loss = first, ledger.known(chain.identities[first]).loss
    for index in range(first + 1, stop):
        later = ledger.known(chain.identities[index]).loss
        if later is not None and _how_lost(later) is not _how_lost(loss):
            yield Miss(_how_lost(loss), start * size, (index - start) * size, loss)
            start, loss = index, later
    yield Miss(_how_lost(loss), start * size, (stop - start) * size, loss)


def _how_lost(loss: Loss | None) -> Reason:
    """None: the ledger has not heard how, and most blocks go by eviction."""
    return _LOST[loss.kind] if loss is not None else Reason.EVICTED


def _divergence(ledger: Ledger, chain: TokenChain, index: int, length: int) -> Divergence | None:
    """How block ``index`` differs from the known block in its place that it has most in common with."""
    # A chain that has just become private may have left what is public: both go on from here.
    public = chain.identities[index - 1] if index else chain.root
    rivals = [known for parent in dict.fromkeys((chain.parent(index), public)) if (known := ledger.children(parent))]
    if not rivals:
        return None
    tokens = chain.block_tokens(index)
    nearest, common = max((_nearest(ledger, each, tokens) for each in rivals), key=lambda found: found[1])
    position = index * chain.block_size + common
    return Divergence(
        position,
        tuple(chain.slice(max(0, position - SHOWN_TOKENS), position)),
        _tokens_from(ledger, nearest, common),
        tuple(chain.slice(position, min(length, position + SHOWN_TOKENS))),
        cached=nearest.loss is None,
    )


def _nearest(ledger: Ledger, siblings: Sequence[Identity], tokens: bytes) -> tuple[Entry, int]:
    """The entry with the longest common run with ``tokens``, a cached one before a lost one; and that run.

    In sorted order the longest common run is with a neighbour, and those with an equal run lie side by side.
    """
    at = ledger.place_among(siblings, tokens)
    longest = max(_common(ledger, siblings[near], tokens) for near in (at - 1, at) if 0 <= near < len(siblings))
    best: Entry | None = None
    for side in (range(at, len(siblings)), range(at - 1, -1, -1)):
        for near in islice(side, COMPARED_SIBLINGS):
            if _common(ledger, siblings[near], tokens) < longest:
                break
            entry = ledger.known(siblings[near])
            if entry.loss is None:
                return entry, longest
            best = best or entry
    assert best is not None
    return best, longest


def _common(ledger: Ledger, identity: Identity, tokens: bytes) -> int:
    return common_tokens(ledger.known(identity).tokens, tokens)


def _tokens_from(ledger: Ledger, entry: Entry, skip: int) -> tuple[int, ...]:
    """The tokens that a known chain goes on with, from token ``skip`` of ``entry`` on."""
    encoded = entry.tokens[skip * TOKEN_BYTES :]
    while len(encoded) < SHOWN_TOKENS * TOKEN_BYTES:
        following = ledger.children(entry.identity)
        if not following:
            break
        entry = ledger.known(following[0])
        encoded += entry.tokens
    return decode_tokens(encoded[: SHOWN_TOKENS * TOKEN_BYTES])


def decode_tokens(encoded: bytes) -> tuple[int, ...]:
    """The token ids that `encode_tokens` encoded."""
    starts = range(0, len(encoded), TOKEN_BYTES)
    return tuple(int.from_bytes(encoded[at : at + TOKEN_BYTES], "little", signed=True) for at in starts)
