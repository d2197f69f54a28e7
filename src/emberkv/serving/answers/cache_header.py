"""The ``x-emberkv-cache`` header: where a prompt's tokens came from, in one line.

    header  = "hit=" int *( ";" place "=" int ) ";miss=" int [ ";why=" reason "@" int ]
    place   = "pool" / a tier's name             ; where the hit's tokens were; absent where there were none
    reason  = a value of `Reason`                ; why most of the missed tokens were missed
    int     = decimal digits                     ; tokens; behind "@", the prompt's first token that the reason is for

For example ``hit=7936;pool=7936;miss=64;why=diverged@7936``. Of several prompts in one request, the first one counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from emberkv.core.events import POOL
from emberkv.core.explaining.explanation import Explanation, Reason
from emberkv.engine.request import CacheUsage
from emberkv.errors import RequestError

CACHE_HEADER = "x-emberkv-cache"

_PATTERN = re.compile(
    r"hit=(?P<hit>\d+)(?P<places>(?:;[a-z][a-z0-9-]*=\d+)*?);miss=(?P<miss>\d+)"
    r"(?:;why=(?P<why>[a-z-]+)@(?P<at>\d+))?"
)


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What the header says. at: the prompt's first token that ``why`` is for."""

    hit: int
    places: Mapping[str, int]
    miss: int
    why: Reason | None = None
    at: int = 0

    def __str__(self) -> str:
        pairs = [f"hit={self.hit}", *(f"{place}={tokens}" for place, tokens in self.places.items())]
        pairs.append(f"miss={self.miss}")
        if self.why is not None:
            pairs.append(f"why={self.why.value}@{self.at}")
        return ";".join(pairs)


def summary_of(usage: CacheUsage, explanation: Explanation | None) -> CacheSummary:
    """Tokens are those that the API counts; the explanation says why the rest is missed.

    A divergence is placed at the very token that differs.
    """
    pool = usage.cached_tokens - sum(usage.tokens_by_tier.values())
    places = {POOL: pool, **usage.tokens_by_tier} if pool else usage.tokens_by_tier
    dominant = None if explanation is None else explanation.dominant
    if explanation is None or dominant is None:
        return CacheSummary(usage.cached_tokens, places, usage.computed_tokens)
    diverged = explanation.divergence if dominant.reason is Reason.DIVERGED else None
    at = dominant.start if diverged is None else diverged.position
    return CacheSummary(usage.cached_tokens, places, usage.computed_tokens, dominant.reason, at)


def parse_summary(header: str) -> CacheSummary:
    """Raises RequestError for a text that is no such header."""
    match = _PATTERN.fullmatch(header)
    if match is None or (match["why"] and match["why"] not in {reason.value for reason in Reason}):
        raise RequestError(
            f"{CACHE_HEADER} is {header!r}; it must be like 'hit=32;pool=32;miss=5;why=new@32'", param=CACHE_HEADER
        )
    pairs = (pair.split("=") for pair in match["places"].split(";")[1:])
    places = {place: int(tokens) for place, tokens in pairs}
    why = Reason(match["why"]) if match["why"] else None
    return CacheSummary(int(match["hit"]), places, int(match["miss"]), why, int(match["at"] or 0))
