"""Which replica has which blocks, in its pool and in the tiers below it, as its events tell.

The index is a hash table in a numpy array. A row is a block: the first 8 bytes of its hash, and one word of 64 bits
for each tier and each 64 replicas, a bit for every replica that has it. That is 16 bytes a row while there are at most
64 replicas and no lower tier, and at most 0.6 of the rows are in use. Two blocks with the same first 8 bytes would be
taken for one, which happens once in millions of times 10 million blocks, and costs no more than a request that is
routed to a replica without its prefix.

Blocks may be evicted in any order: a hit ends at the first block that is missing. A chain of at most ``WHOLE`` blocks
is looked up block by block. A longer one is sampled: every ``STRIDE``-th block is looked up, and then each block
between two samples that different replicas have. Where the same replicas have both samples, they are taken to have the
blocks between them. So a gap of ``STRIDE`` blocks or more is always found, and so is one that lies beside the end of
any replica's hit; a shorter one may be overlooked. The replica that gets the request then computes the missing block,
and with that the gap is closed.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from emberkv.cluster.block_table import ONE, BlockTable, Rows
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash

SHARED = "shared"
"""The name of the tier that all replicas read: what one of them stored there, all have."""

TIERS = (POOL, "ram", "disk", SHARED)
"""Fastest first; tiers of other names come behind these, in the order in which they are heard of."""

WORD = 64  # replicas in one word of a row
AT_ONCE = 96  # from so many blocks on, numpy looks them up
WHOLE = 512
"""Longer chains are sampled."""
STRIDE = 16
"""Blocks from one sample of a long chain to the next."""

WORDS_OF_A_HASH = 4


class BlockIndex:
    """The blocks of many replicas, which are known by their slots.

    probes: rows looked up by `matches` so far, collisions left aside.

    >>> index = BlockIndex()
    >>> first, second = bytes(32), bytes([1] * 32)
    >>> index.add(0, [first, second])
    >>> index.add(1, [first])
    >>> index.add(1, [second], "disk")
    >>> index.matches([first, second], 2)
    [{'pool': 2}, {'pool': 1, 'disk': 1}]
    """

    def __init__(self) -> None:
        self.probes = 0
        self._words: dict[tuple[str, int], int] = {(POOL, 0): 0}  # numbers of a tier's words
        self._tiers = [POOL]
        self._table = BlockTable(words=1)

    def __len__(self) -> int:
        """Different blocks known."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._table.nbytes

    def apply(self, replica: int, event: Event) -> None:
        """Take in one event of a replica, in order."""
        match event:
            case BlockStored():
                self.add(replica, event.block_hashes, event.tier)
            case BlockRemoved():
                self.remove(replica, event.block_hashes, event.tier)
            case AllBlocksCleared():
                self._table.clear(*self._place(replica, event.tier))

    def add(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """The replica has these blocks. To add a block again changes nothing."""
        word, bit = self._place(replica, tier)
        if len(block_hashes) < AT_ONCE:
            self._table.add(_tags(block_hashes), word, bit)
        else:
            self._table.add_many(_tag_array(block_hashes), word, bit)

    def remove(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """The replica has these blocks no longer. To remove one that it has not changes nothing."""
        self._table.remove(_tags(block_hashes), *self._place(replica, tier))

    def forget(self, replica: int) -> None:
        """Nothing of the replica is left in tiers of its own. Goes over the whole table."""
        for tier in self._tiers:
            if tier != SHARED:
                self._table.clear(*self._place(replica, tier))

    def matches(self, block_hashes: Sequence[BlockHash], replicas: int) -> list[dict[str, int]]:
        """For each replica of the first ``replicas`` slots, how many leading blocks it has, by tier.

        A block counts for the fastest tier that has it, and blocks count up to the first that no tier has.
        """
        runs = _Runs(self._tiers, replicas)
        for count, words in self._look_up(block_hashes):
            if not runs.take(count, self._holders(words, runs.everyone)):
                break
        return runs.ended()

    def _holders(self, words: Sequence[int], everyone: int) -> list[int]:
        """Of one block, for each tier, the replicas that have it as the bits of one integer."""
        holders = dict.fromkeys(self._tiers, 0)
        for (tier, group), number in self._words.items():
            holders[tier] |= words[number] << (WORD * group)
        if holders.get(SHARED):
            holders[SHARED] = everyone
        return list(holders.values())

    def _look_up(self, block_hashes: Sequence[BlockHash]) -> Iterable[tuple[int, Sequence[int]]]:
        """How many consecutive blocks have the same words, and these."""
        if len(block_hashes) < AT_ONCE:
            for tag in _tags(block_hashes):
                self.probes += 1
                yield 1, self._table.words(tag)
            return
        depths, found = self._sampled(block_hashes)
        changes = np.flatnonzero((found[1:] != found[:-1]).any(axis=1)) + 1
        starts = [0, *depths[changes].tolist()]
        words = found[np.concatenate(([0], changes))].tolist()
        for start, stop, each in zip(starts, [*starts[1:], len(block_hashes)], words, strict=True):
            yield stop - start, each

    def _sampled(self, block_hashes: Sequence[BlockHash]) -> tuple[NDArray[np.intp], Rows]:
        """Depths in order, and the words of the blocks there; between two, there is no change that shows in them."""
        blocks = len(block_hashes)
        if blocks <= WHOLE:
            return np.arange(blocks), self._gather(block_hashes)
        depths = np.arange(0, blocks + STRIDE - 1, STRIDE)
        depths[-1] = blocks - 1
        samples = self._gather([block_hashes[depth] for depth in depths.tolist()])
        changes = np.flatnonzero((samples[1:] != samples[:-1]).any(axis=1))
        between = (depths[changes, None] + np.arange(1, STRIDE)).ravel()
        between = between[between < blocks - 1]
        if not len(between):
            return depths, samples
        found, looked_up = np.empty((blocks, samples.shape[1]), np.uint64), np.zeros(blocks, np.bool_)
        found[depths], looked_up[depths] = samples, True
        found[between] = self._gather([block_hashes[depth] for depth in between.tolist()])
        looked_up[between] = True
        depths = np.flatnonzero(looked_up)
        return depths, found[depths]

    def _gather(self, block_hashes: Sequence[BlockHash]) -> Rows:
        self.probes += len(block_hashes)
        return self._table.gather(_tag_array(block_hashes))

    def _place(self, replica: int, tier: str) -> tuple[int, int]:
        """Word and bit of a replica in a tier; a word is added where none is free."""
        group, number = divmod(0 if tier == SHARED else replica, WORD)
        word = self._words.get((tier, group))
        if word is None:
            word = self._words[tier, group] = self._table.add_word()
            if tier not in self._tiers:
                self._tiers.append(tier)
                self._tiers.sort(key=lambda each: TIERS.index(each) if each in TIERS else len(TIERS))
        return word, 1 << number


class _Runs:
    """Counts the leading blocks of each replica by tier, from groups of blocks that the same replicas have."""

    def __init__(self, tiers: Sequence[str], replicas: int) -> None:
        self.everyone = (1 << replicas) - 1
        self._tiers = tiers
        self._counts: list[dict[str, int]] = [{} for _ in range(replicas)]
        self._going = self.everyone  # replicas without a gap so far
        self._served = [0] * len(tiers)  # by tier: replicas whose present run is in it
        self._began = [[0] * replicas for _ in tiers]
        self._depth = 0

    def take(self, count: int, holders: Sequence[int]) -> int:
        """The next ``count`` blocks, with their holders by tier; 0 where no replica has them."""
        left = self._going
        for tier, having in enumerate(holders):
            now = left & having
            left &= ~now
            if now != self._served[tier]:
                self._change(tier, now)
        self._going &= ~left
        self._depth += count
        return self._going

    def ended(self) -> list[dict[str, int]]:
        """The counts, after the last blocks."""
        for tier in range(len(self._tiers)):
            self._change(tier, 0)
        return self._counts

    def _change(self, tier: int, now: int) -> None:
        """From here on, the tier serves other replicas."""
        before, name, began = self._served[tier], self._tiers[tier], self._began[tier]
        for replica in _bits(before & ~now):
            counts = self._counts[replica]
            counts[name] = counts.get(name, 0) + self._depth - began[replica]
        for replica in _bits(now & ~before):
            began[replica] = self._depth
        self._served[tier] = now


def _bits(bits: int) -> Iterable[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _tags(block_hashes: Sequence[BlockHash]) -> list[int]:
    """The first 8 bytes of each hash as a number; never 0, which marks a free row."""
    return [tag or 1 for tag in memoryview(b"".join(block_hashes)).cast("Q")[::WORDS_OF_A_HASH].tolist()]


def _tag_array(block_hashes: Sequence[BlockHash]) -> Rows:
    """As `_tags`, as an array."""
    return np.maximum(np.frombuffer(b"".join(block_hashes), np.uint64)[::WORDS_OF_A_HASH], ONE)
