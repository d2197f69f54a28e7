"""One block: ``block_size`` tokens' KV state in one slot of the pool."""

from dataclasses import dataclass
from enum import Enum

from emberkv.core.hashing import Identity


class BlockState(Enum):
    """Where a block is in its life; a FREE block with an identity is still a cache entry."""

    FREE = "free"  # nobody holds it; its slot may be taken
    PENDING = "pending"  # held by a load, which brings its content from a lower tier
    ALLOCATED = "allocated"  # held, and being written; visible to its holder only
    COMMITTED = "committed"  # held, complete, and found under its identity


@dataclass(slots=True, eq=False)
class Block:
    """A slot and what it holds.

    tokens: the block's own token ids, encoded, kept so that a hit is compared and a miss can be explained.
    position: the block's index in its chain. owner: on whose books it is.
    exact: the content is bit-equal to what a cold prefill of the same chain writes. False for KV that decode steps
    or partial chunks computed, and for everything computed on top of such KV.
    partial: ``tokens`` are fewer than a block's. It is the end of what a sequence left behind the block ``parent``, and
    is found by `BlockPool.find_tail` only.
    """

    slot: int
    state: BlockState = BlockState.FREE
    ref_count: int = 0
    identity: Identity | None = None
    parent: Identity = b""
    tokens: bytes = b""
    position: int = 0
    owner: str = ""
    exact: bool = False
    partial: bool = False
