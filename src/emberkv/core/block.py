"""One block of the pool, which holds the KV state of up to ``block_size`` tokens; the result of a look-up."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from emberkv.core.hashing import BlockHash


class BlockState(Enum):
    """Where a block is in its life; a FREE block with a hash is still a cache entry."""

    FREE = "free"  # without a holder; it may be overwritten
    PENDING = "pending"  # held by a load, which brings its content from a lower tier
    ALLOCATED = "allocated"  # held, and being written; visible to its holder only
    COMMITTED = "committed"  # held, complete, and found under its block hash


@dataclass(slots=True, eq=False, init=False)
class Block:
    """One physical block and what it holds.

    block_id: its index in the pool's storage; a block table is a list of these.

    tokens: the block's own token ids, encoded, kept so that a hit is compared and a miss can be explained.
    position: the block's index in its chain. owner: the tenant to whose share it counts.
    exact: the content is bit-equal to what a cold prefill of the same chain writes. False for KV that decode steps
    or partial chunks computed, and for everything computed on top of such KV.
    num_tokens: how many tokens of a cached block are found; fewer than a block's in a *partial* block, which holds the
    end of what a finished sequence computed. Only `BlockPool.longest_child` finds a partial block.
    keep_when_extended: a partial block that a longer one does not replace: one that was left within a prompt, or stays
    behind an answer from which the next turn went on.
    retained: a partial block that is evicted last, as a warm prompt's end is; nor does a longer one take its place.
    previous: of a partial block, the hash of the full block before it, without the tenant's salt.
    """

    block_id: int
    state: BlockState
    ref_count: int
    block_hash: BlockHash | None
    parent: BlockHash
    tokens: bytes
    position: int
    owner: str
    exact: bool
    num_tokens: int
    partial: bool
    keep_when_extended: bool
    retained: bool
    previous: BlockHash

    def __init__(self, block_id: int) -> None:
        """A blank block."""
        self.block_id = block_id
        self.state = BlockState.FREE
        self.ref_count = 0
        self.block_hash = None
        self.parent = b""
        self.tokens = b""
        self.position = 0
        self.owner = ""
        self.exact = False
        self.num_tokens = 0
        self.partial = False
        self.keep_when_extended = False
        self.retained = False
        self.previous = b""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Before a step computes, the KV bytes of block ``source`` are to be copied into ``target``.

    num_tokens: how many leading tokens of ``source`` are reused; what lies behind them in ``target`` is overwritten as
    the sequence goes on, and never attended to before.
    """

    source: Block
    target: Block
    num_tokens: int


class MatchEnd(Enum):
    """Why a match stopped where it did."""

    LIMIT = "limit"  # every block asked for was found
    ABSENT = "absent"  # the next block hash is not in the pool
    TOKENS_DIFFER = "tokens_differ"  # the hash is there, the tokens under it are others: never served
    OFF = "off"  # caching is switched off, or the prompt's logits are wanted, which are not cached
    INEXACT = "inexact"  # the next block is not bit-equal to a cold prefill, and only such were asked for


class Match(NamedTuple):
    """The blocks that a look-up found, in chain order, and why there are no more."""

    blocks: list[Block]
    end: MatchEnd
