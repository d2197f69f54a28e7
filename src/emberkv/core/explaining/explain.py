"""Explains a prompt: what it would hit if it came now, and why the tokens that were not found were not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from emberkv.core.block import MatchEnd
from emberkv.core.events import POOL
from emberkv.core.explaining.explanation import (
    CacheOutcome,
    Divergence,
    Explanation,
    Loss,
    LossKind,
    Miss,
    MissReason,
    outcome_of,
)
from emberkv.core.explaining.ledger import Entry, Ledger
from emberkv.core.hashing import TOKEN_BYTES, BlockHash, Chain, TokenChain, common_tokens, decode_tokens
from emberkv.core.loading import (
    NOTHING_BELOW,
    Admission,
    LoadChoice,
    LoadDecision,
    LookupStatus,
    LowerTiers,
    StoredPartial,
)
from emberkv.core.pending_loads import LoadSavings
from emberkv.core.prefix_cache import PrefixCache

K = TypeVar("K")

SHOWN_TOKENS = 24
"""Tokens shown on either side of a divergence."""
COMPARED_SIBLINGS = 64
"""How many equally near blocks, on either side, are asked whether they are still cached."""


REFUSED = {MatchEnd.INEXACT: MissReason.INEXACT, MatchEnd.TOKENS_DIFFER: MissReason.COLLISION}
"""Why a search ended at a block that is there."""

_LOST = {
    LossKind.EVICTED: MissReason.EVICTED,
    LossKind.REMOVED: MissReason.REMOVED,
    LossKind.CLEARED: MissReason.CLEARED,
}


def admission_outcome(admission: Admission, prompt_tokens: int) -> CacheOutcome:
    """What an admission found of a prompt."""
    if admission.end is MatchEnd.OFF:
        return CacheOutcome(set_aside={MissReason.CACHE_OFF: prompt_tokens})
    hit = {POOL: admission.pool_tokens, **admission.tier_tokens}
    set_aside = {
        MissReason.ALIGNMENT: admission.alignment_tokens,
        MissReason.RECOMPUTE_CHEAPER: admission.recompute_cheaper_tokens,
        MissReason.LOAD_FAILED: admission.load_failed_tokens,
    }
    return CacheOutcome(_some(hit), _some(set_aside), REFUSED.get(admission.end))


def explain(
    ledger: Ledger,
    chain: TokenChain,
    outcome: CacheOutcome,
    *,
    hit_unit: int,
    prompt_tokens: int | None = None,
    checkpoints: bool = False,
) -> Explanation:
    """Account for every token of a prompt, of which ``outcome`` was found.

    chain: begins with the prompt. prompt_tokens: the prompt's length; None: it is all of the chain. hit_unit: hits end
    at a multiple of this many tokens, as `PrefixCache.hit_unit` says. checkpoints: or at a checkpoint, so that no
    prompt is too short for a hit.
    """
    length = len(chain) if prompt_tokens is None else prompt_tokens
    misses: list[Miss] = []
    at = sum(outcome.hit.values())
    for reason, tokens in outcome.set_aside.items():
        misses.append(Miss(reason, at, min(tokens, length - at)))
        at = misses[-1].stop
    divergence = None
    if hit_unit > 1 and length <= hit_unit and not outcome.hit and not checkpoints:
        misses.append(Miss(MissReason.TOO_SHORT, at, length - at))
    else:
        grain = 1 if hit_unit == 1 else chain.block_size
        stop = max(at, (length - 1) // grain * grain)
        rest, divergence = _rest(ledger, chain, at, stop, length, outcome.refused, copied=hit_unit == 1)
        misses += [*rest, Miss(MissReason.LAST if hit_unit == 1 else MissReason.PARTIAL, stop, length - stop)]
    kept = tuple(miss for miss in misses if miss.tokens)
    return Explanation(length, dict(outcome.hit), kept, divergence)


def _some(counts: dict[K, int]) -> dict[K, int]:
    return {key: count for key, count in counts.items() if count}


def _rest(
    ledger: Ledger, chain: TokenChain, at: int, stop: int, length: int, refused: MissReason | None, *, copied: bool
) -> tuple[list[Miss], Divergence | None]:
    """What became of the prompt's tokens ``[at, stop)``: of known blocks, of the beginning of one more, of the rest.

    ``at`` lies within a block where a hit ends there, which may be one that the ledger does not know. copied: the
    beginnings of blocks in the pool are reused.
    """
    size = chain.block_size
    first = known = at // size
    while (known + 1) * size <= stop and chain.block_hashes[known] in ledger:
        known += 1
    misses: list[Miss] = []
    divergence = None
    if known > first and refused is not None:
        misses.append(Miss(refused, first * size, (known - first) * size, ledger.known(chain.block_hashes[first]).loss))
    elif known > first:
        misses += _losses(ledger, chain, first, known)
    if known * size < stop:
        beginning, divergence = _divergence(ledger, chain, known, stop, length, copied=copied)
        if divergence is not None and divergence.position < at:  # the hit went further, in a block of no ledger
            divergence = None
        if misses and misses[-1].reason is beginning.reason:
            misses[-1] = replace(misses[-1], tokens=misses[-1].tokens + beginning.tokens)
        else:
            misses.append(beginning)
        reason = MissReason.NEW if divergence is None else MissReason.DIVERGED
        misses.append(Miss(reason, beginning.stop, stop - beginning.stop))
    left = [replace(miss, start=max(at, miss.start), tokens=miss.stop - max(at, miss.start)) for miss in misses]
    return [miss for miss in left if miss.tokens > 0], divergence


def _losses(ledger: Ledger, chain: TokenChain, first: int, stop: int) -> Iterator[Miss]:
    """Known blocks ``[first, stop)``, the first of which is gone: a miss for each run of them that went in one way.

    What is still cached behind a lost block is of no use without it, and counts with it.
    """
    size = chain.block_size
    start, loss = first, ledger.known(chain.block_hashes[first]).loss
    for index in range(first + 1, stop):
        later = ledger.known(chain.block_hashes[index]).loss
        if later is not None and _how_lost(later) is not _how_lost(loss):
            yield Miss(_how_lost(loss), start * size, (index - start) * size, loss)
            start, loss = index, later
    yield Miss(_how_lost(loss), start * size, (stop - start) * size, loss)


def _how_lost(loss: Loss | None) -> MissReason:
    """None: the ledger has not heard how, and most blocks go by eviction."""
    return _LOST[loss.kind] if loss is not None else MissReason.EVICTED


def _divergence(
    ledger: Ledger, chain: TokenChain, index: int, stop: int, length: int, *, copied: bool
) -> tuple[Miss, Divergence | None]:
    """How block ``index``, up to token ``stop``, differs from the known block in its place that it is nearest to.

    Returns the tokens that both begin with, as a miss, and the difference; None where nothing known differs.
    """
    # A chain that has just become private may have left what is public: both go on from here.
    parents = dict.fromkeys((chain.parent(index), chain.unsalted_parent(index)))
    rivals = [known for parent in parents if (known := ledger.children(parent))]
    start = index * chain.block_size
    if not rivals:
        return Miss(MissReason.NEW, start, 0), None
    tokens = chain.encoded_slice(start, min(start + chain.block_size, stop))
    nearest, common = max((_nearest(ledger, each, tokens) for each in rivals), key=lambda found: found[1])
    lost = nearest.loss is not None or (copied and POOL in ledger.tiers_of(nearest.block_hash))
    beginning = Miss(_how_lost(nearest.loss) if lost else MissReason.ALIGNMENT, start, common, nearest.loss)
    position = start + common
    if position == min(start + chain.block_size, stop):
        return beginning, None
    return beginning, Divergence(
        position,
        tuple(chain.slice(max(0, position - SHOWN_TOKENS), position)),
        _tokens_from(ledger, nearest, common),
        tuple(chain.slice(position, min(length, position + SHOWN_TOKENS))),
        cached=nearest.loss is None,
    )


def _nearest(ledger: Ledger, siblings: Sequence[BlockHash], tokens: bytes) -> tuple[Entry, int]:
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


def _common(ledger: Ledger, block_hash: BlockHash, tokens: bytes) -> int:
    return common_tokens(ledger.known(block_hash).tokens, tokens)


def _tokens_from(ledger: Ledger, entry: Entry, skip: int) -> tuple[int, ...]:
    """The tokens that a known chain goes on with, from token ``skip`` of ``entry`` on."""
    encoded = entry.tokens[skip * TOKEN_BYTES :]
    while len(encoded) < SHOWN_TOKENS * TOKEN_BYTES:
        following = ledger.children(entry.block_hash)
        if not following:
            break
        entry = ledger.known(following[0])
        encoded += entry.tokens
    return decode_tokens(encoded[: SHOWN_TOKENS * TOKEN_BYTES])


def look_up(cache: PrefixCache, lower: LowerTiers | None, chain: Chain) -> CacheOutcome:
    """The outcome for ``chain`` as a prompt. What a load would bring counts as hit."""
    match = cache.match(chain)
    if match.end is MatchEnd.OFF:
        return CacheOutcome(set_aside={MissReason.CACHE_OFF: len(chain)})
    size, known = cache.pool.block_size, len(match.blocks)
    below, pending, declined = NOTHING_BELOW, 0, 0
    checkpoint: StoredPartial | None = None
    if lower is not None and match.end is not MatchEnd.TOKENS_DIFFER:
        below, pending, checkpoint, declined = _from_below(cache, lower, chain, known)
    loaded = below.runs if below.choice is LoadChoice.LOAD else []
    runs = [(POOL, known), *((run.tier, run.count) for run in loaded)]
    outcome = outcome_of(runs, len(chain), block_size=size, alignment=cache.alignment)
    hit, set_aside = dict(outcome.hit), dict(outcome.set_aside)
    found = cache.longest_child(chain, known + sum(run.count for run in loaded))
    copied = found[1] if found is not None else 0
    if checkpoint is not None:
        copied = checkpoint.count
    if copied:
        tier = POOL if checkpoint is None else checkpoint.tier
        hit[tier] = hit.get(tier, 0) + copied
    if below.rounded:
        set_aside[MissReason.ALIGNMENT] = set_aside.get(MissReason.ALIGNMENT, 0) + below.rounded * size
    if below.declined:  # the checkpoint's tokens begin the first one of these
        set_aside[MissReason.RECOMPUTE_CHEAPER] = below.declined * size - copied
    elif declined:
        set_aside[MissReason.RECOMPUTE_CHEAPER] = declined
    if pending:
        set_aside[MissReason.LOOK_UP] = pending * size - (0 if below.declined else copied + declined)
    return CacheOutcome(hit, set_aside, None if loaded else REFUSED.get(match.end))


def _from_below(
    cache: PrefixCache, lower: LowerTiers, chain: Chain, known: int
) -> tuple[LoadDecision, int, StoredPartial | None, int]:
    """What to load of the blocks behind the first ``known`` ones, how many more only a query of a tier can find, and
    what `LoadSavings.checkpoint_to_load` says of the checkpoint behind them.
    """
    stop = max(known, cache.whole(cache.usable_blocks(chain)))
    runs = lower.find(chain.block_hashes[known:stop], exact=cache.exact) if known < stop else []
    end = known + sum(run.count for run in runs)
    pending = end < stop and lower.status(chain.block_hashes[end], exact=cache.exact) is LookupStatus.PENDING
    savings = LoadSavings(cache, lower, chain, known)
    decision = savings.choose(runs)
    checkpoint, declined = savings.checkpoint_to_load(decision)
    return decision, stop - end if pending else 0, checkpoint, declined
