"""Why a prompt missed: where each of its tokens came from, and for the rest the reason. Plain values, no text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

"""The name of the tier whose blocks need no loading."""


class MissReason(Enum):
    """Why tokens were computed although there is a cache."""

    NEW = "new"  # the prompt goes on where nothing known does
    DIVERGED = "diverged"  # what is known goes on with other tokens
    EVICTED = "evicted"  # it was cached, and its memory was needed; see the loss
    REMOVED = "removed"  # it was cached, and an operator removed it
    CLEARED = "cleared"  # it was cached, and the whole cache was emptied
    OTHER_MODEL = "other-model"  # the same tokens are cached for another model
    OTHER_TENANT = "other-tenant"  # the same tokens are cached for another tenant
    RECOMPUTE_CHEAPER = "recompute"  # a tier has it; computing was expected to be faster than loading
    LOOK_UP = "look-up"  # a tier may have it; that takes a look-up over the network, for which no request waits
    LOAD_FAILED = "load-failed"  # a tier had it; loading failed, came too late, or brought what cannot be trusted
    INEXACT = "inexact"  # it is cached, not bit-equal to a cold prefill, and only such state may be reused
    COLLISION = "collision"  # its block hash is taken by other tokens: never served
    CACHE_OFF = "cache-off"  # prompts are not looked up
    ALIGNMENT = "alignment"  # it is cached, and lies beyond the last whole unit in which it can be reused or loaded
    PARTIAL = "partial"  # hits end at blocks; the last one is not full, or ends with the prompt's last token
    TOO_SHORT = "too-short"  # hits end at a unit of several tokens, the prompt is no longer, and nothing was found
    LAST = "last-token"  # hits end at any token, and the prompt's last one is computed for the scores that follow it


class LossKind(Enum):
    EVICTED = "evicted"  # its memory was needed
    CLEARED = "cleared"  # the whole tier was emptied
    REMOVED = "removed"  # an operator removed it


@dataclass(frozen=True, slots=True)
class Loss:
    """How the last tier that held a block lost it. at: seconds, by the clock of the ledger's writer."""

    tier: str
    at: float
    kind: LossKind


@dataclass(frozen=True, slots=True)
class Miss:
    """Tokens ``[start, start + tokens)`` of the prompt were not reused."""

    reason: MissReason
    start: int
    tokens: int
    loss: Loss | None = None

    @property
    def stop(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves the nearest known one, which goes on with ``expected`` instead of ``found``.

    position: index of the first token that differs. before: tokens that both have, up to it. cached: whether the
    nearest one is still cached.
    """

    position: int
    before: tuple[int, ...]
    expected: tuple[int, ...]
    found: tuple[int, ...]
    cached: bool


@dataclass(frozen=True, slots=True)
class CacheOutcome:
    """What was found of a prompt, in tokens from its beginning: first ``hit``, then ``set_aside``.

    hit: reused, by tier. set_aside: found, and for these reasons not reused. refused: why the next block, should it
    be known, could not be used; None when it simply is not there.
    """

    hit: Mapping[str, int] = field(default_factory=dict)
    set_aside: Mapping[MissReason, int] = field(default_factory=dict)
    refused: MissReason | None = None

    @property
    def tokens(self) -> int:
        return sum(self.hit.values()) + sum(self.set_aside.values())


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every token of a prompt accounted for: first those of ``hit``, by tier, then ``misses``, in order."""

    prompt_tokens: int
    hit: Mapping[str, int]
    misses: tuple[Miss, ...]
    divergence: Divergence | None = None

    @property
    def hit_tokens(self) -> int:
        return sum(self.hit.values())

    @property
    def dominant(self) -> Miss | None:
        """The miss with the most tokens; the first of equals. None when there is no token to compute."""
        return max(self.misses, key=lambda miss: miss.tokens, default=None)

    def with_elsewhere(self, reason: MissReason, tokens: int) -> "Explanation":
        """As this one, where the prompt's first ``tokens`` are cached out of its reach, for ``reason``.

        That explains what would otherwise be new or have diverged.
        """
        misses: list[Miss] = []
        for miss in self.misses:
            covered = min(miss.stop, tokens) - miss.start
            if miss.reason not in (MissReason.NEW, MissReason.DIVERGED) or covered <= 0:
                misses.append(miss)
                continue
            misses.append(Miss(reason, miss.start, covered))
            if covered < miss.tokens:
                misses.append(replace(miss, start=miss.start + covered, tokens=miss.tokens - covered))
        return replace(self, misses=tuple(misses))


def outcome_of(runs: Sequence[tuple[str, int]], prompt_tokens: int, *, block_size: int, alignment: int) -> CacheOutcome:
    """The outcome of a look-up that found ``runs`` of (tier, blocks) from a prompt's beginning.

    Hits end at a multiple of ``alignment`` tokens and leave at least the prompt's last token to compute, as in
    `PrefixCache.find`.
    """
    usable = (prompt_tokens - 1) // block_size * block_size
    found = min(sum(blocks for _, blocks in runs) * block_size, usable)
    reused = min(found, (prompt_tokens - 1) // alignment * alignment) // alignment * alignment
    hit: dict[str, int] = {}
    left = reused
    for tier, blocks in runs:
        tokens = min(blocks * block_size, left)
        if tokens:
            hit[tier] = hit.get(tier, 0) + tokens
        left -= tokens
    return CacheOutcome(hit, {MissReason.ALIGNMENT: found - reused} if found > reused else {})
