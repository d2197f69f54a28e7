"""What a prompt would hit if it came now, decided as an admission decides it; holds, loads and counts nothing."""

from emberkv.core.block import MatchEnd
from emberkv.core.events import POOL
from emberkv.core.explaining.explain import REFUSED
from emberkv.core.explaining.explanation import Outcome, Reason, outcome_of
from emberkv.core.hashing import Chain
from emberkv.core.loading import NOTHING_BELOW, LoadChoice, LoadDecision, LowerTiers
from emberkv.core.pending_loads import LoadSavings
from emberkv.core.prefix_cache import PrefixCache


def look_up(cache: PrefixCache, lower: LowerTiers | None, chain: Chain) -> Outcome:
    """The outcome for ``chain`` as a prompt. What a load would bring counts as hit."""
    match = cache.match(chain)
    if match.end is MatchEnd.OFF:
        return Outcome(set_aside={Reason.CACHE_OFF: len(chain)})
    size, known = cache.pool.block_size, len(match.blocks)
    below = NOTHING_BELOW
    if lower is not None and match.end in (MatchEnd.ABSENT, MatchEnd.INEXACT):
        below = _from_below(cache, lower, chain, known)
    loaded = below.runs if below.choice is LoadChoice.LOAD else []
    runs = [(POOL, known), *((run.tier, run.count) for run in loaded)]
    outcome = outcome_of(runs, len(chain), block_size=size, alignment=cache.alignment)
    hit, set_aside = dict(outcome.hit), dict(outcome.set_aside)
    found = cache.longest_child(chain, known + sum(run.count for run in loaded))
    copied = found[1] if found is not None else 0
    if copied:
        hit[POOL] = hit.get(POOL, 0) + copied
    if below.rounded:
        set_aside[Reason.ALIGNMENT] = set_aside.get(Reason.ALIGNMENT, 0) + below.rounded * size
    if below.declined:
        set_aside[Reason.RECOMPUTE_CHEAPER] = below.declined * size - copied
    return Outcome(hit, set_aside, None if loaded else REFUSED.get(match.end))


def _from_below(cache: PrefixCache, lower: LowerTiers, chain: Chain, known: int) -> LoadDecision:
    """What to load of the blocks behind the first ``known`` ones."""
    stop = cache.whole(cache.usable_blocks(chain))
    if known >= stop:
        return NOTHING_BELOW
    runs = lower.find(chain.block_hashes[known:stop], exact=cache.exact)
    return LoadSavings(cache, lower, chain, known).choose(runs)
