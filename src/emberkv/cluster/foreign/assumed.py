"""Estimates the cached blocks of a worker without KV events: an LRU model of the prompts that were sent to it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.events import BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash, TokenChain

DEFAULT_TOKENS = 1_000_000
DEFAULT_TTL = 3600.0

SLACK_BLOCKS = 2
"""A worker may reuse so many blocks fewer than assumed without having evicted any: its blocks may be larger, and the
last token of a prompt is always computed.
"""


@dataclass(frozen=True, slots=True)
class Held:
    """The leading blocks of a prompt that the worker is assumed to have, by the time of each one's last use."""

    used: Sequence[float]

    @property
    def blocks(self) -> int:
        return len(self.used)


class AssumedBlocks:
    """Blocks in the order in which an LRU cache evicts them: least recently used first, of one prompt the last first.

    publish: gets each change as the events that a cache would publish. max_blocks: the assumed capacity. ttl: seconds
    after which an unused block is assumed to be evicted. Times are monotonic seconds.
    """

    def __init__(
        self, publish: Callable[[Sequence[Event]], None], *, max_blocks: int, ttl: float = DEFAULT_TTL
    ) -> None:
        self._publish = publish
        self._max_blocks = max_blocks
        self._ttl = ttl
        self._used: OrderedDict[BlockHash, float] = OrderedDict()  # the next to be evicted first

    def __len__(self) -> int:
        return len(self._used)

    def held(self, chain: TokenChain) -> Held:
        """The leading blocks of a prompt that are assumed to be cached."""
        used = []
        for block_hash in chain.block_hashes:
            at = self._used.get(block_hash)
            if at is None:
                break
            used.append(at)
        return Held(used)

    def computed(self, chain: TokenChain, now: float) -> None:
        """Record that the worker has computed a prompt, so that all of its blocks are cached."""
        hashes = chain.block_hashes[: self._max_blocks]
        events: list[Event] = list(self._runs(chain, len(hashes)))
        for block_hash in reversed(hashes):
            self._used[block_hash] = now
            self._used.move_to_end(block_hash)
        gone = []
        while len(self._used) > self._max_blocks:
            gone.append(self._used.popitem(last=False)[0])
        self._publish([*events, *([BlockRemoved(tuple(gone))] if gone else [])])

    def corrected(self, held: Held, found_blocks: int) -> int:
        """Correct the estimate by an answer: the worker has reused ``found_blocks``, and ``held`` had been assumed.

        A missing block means that all blocks with no later last use are evicted, too. Returns the number of blocks that
        are removed from the estimate.
        """
        if found_blocks + SLACK_BLOCKS >= held.blocks:
            return 0
        return self._drop_until(held.used[found_blocks])

    def expire(self, now: float) -> None:
        """Remove blocks that have not been used for ``ttl`` seconds."""
        self._drop_until(now - self._ttl)

    def clear(self) -> None:
        """Remove all blocks."""
        self._drop_until(float("inf"))

    def _drop_until(self, last: float) -> int:
        gone = []
        for block_hash, used in self._used.items():
            if used > last:
                break
            gone.append(block_hash)
        for block_hash in gone:
            del self._used[block_hash]
        if gone:
            self._publish([BlockRemoved(tuple(gone))])
        return len(gone)

    def _runs(self, chain: TokenChain, stop: int) -> list[BlockStored]:
        """Events for the blocks of a prompt that are new, one for each run of consecutive blocks."""
        runs: list[list[int]] = []
        for index, block_hash in enumerate(chain.block_hashes[:stop]):
            if block_hash in self._used:
                continue
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        return [
            BlockStored(
                tuple(chain.block_hashes[index] for index in run),
                chain.parent(run[0]),
                tuple(chain.block_tokens(index) for index in run),
                chain.block_size,
            )
            for run in runs
        ]
