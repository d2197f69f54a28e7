"""What comes of looking a chain up in the pool: the blocks found, and why there are no more."""

from dataclasses import dataclass
from enum import Enum

from emberkv.core.block import Block


class MatchEnd(Enum):
    """Why a match stopped where it did."""

    LIMIT = "limit"  # every block asked for was found
    ABSENT = "absent"  # the next block hash is not in the pool
    TOKENS_DIFFER = "tokens_differ"  # the hash is there, the tokens under it are others: never served
    OFF = "off"  # caching is switched off, or the prompt's logits are wanted, which are not cached
    INEXACT = "inexact"  # the next block is not bit-equal to a cold prefill, and only such were asked for


@dataclass(frozen=True, slots=True)
class Match:
    blocks: list[Block]
    end: MatchEnd
