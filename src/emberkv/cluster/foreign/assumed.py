"""What a worker that does not say what it has cached is assumed to have: what it was sent, as far as it fits."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.events import BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash, TokenChain

DEFAULT_TOKENS = 1_000_000
DEFAULT_TTL = 3600.0

SLACK_BLOCKS = 2
"""A worker that reuses fewer blocks than were assumed by no more than this has lost none: it counts in larger blocks,
and always computes the last token.
"""


@dataclass(frozen=True, slots=True)
class Held:
    """Of a prompt that is sent, the leading blocks that the worker is assumed to have, and when each was last used."""

    used: Sequence[float]

    @property
    def blocks(self) -> int:
        return len(self.used)


class AssumedBlocks:
    """Blocks in the order in which an LRU cache evicts them: the longest unused first, of one prompt the last first.

    publish: takes what changes, as the events that a cache would publish. max_blocks: the worker's size, as far as it
    is known. ttl: seconds for which a block that is not used again is assumed to stay. Times are seconds of any clock
    that does not go back.
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
        """What of a prompt is assumed to be there."""
        used = []
        for block_hash in chain.block_hashes:
            at = self._used.get(block_hash)
            if at is None:
                break
            used.append(at)
        return Held(used)

    def computed(self, chain: TokenChain, now: float) -> None:
        """The worker has computed a prompt, and so has all of its blocks."""
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
        """The worker has reused ``found_blocks`` of a prompt of which ``held`` was assumed when it was sent.

        If it has lost a block, then it has lost, too, what was used no later. Returns how many are given up.
        """
        if found_blocks + SLACK_BLOCKS >= held.blocks:
            return 0
        return self._drop_until(held.used[found_blocks])

    def expire(self, now: float) -> None:
        """Give up what was not used for too long."""
        self._drop_until(now - self._ttl)

    def clear(self) -> None:
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
        """The blocks of a prompt that are not held yet, as runs of consecutive ones."""
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
