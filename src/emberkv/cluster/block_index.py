"""Which replica has which blocks, in its pool and in the tiers below it, as its events tell.

The index is one hash table in a numpy array: open addressing with linear probing. A row is a block: the first 8 bytes
of its hash, and one word of 64 bits for each tier and each 64 replicas, a bit for every replica that has it. That is
16 bytes a row while there are at most 64 replicas and no lower tier, and at most 0.6 of the rows are in use. Two blocks
with the same first 8 bytes would be taken for one, which happens once in millions of times 10 million blocks, and costs
no more than a request that is routed to a replica without its prefix.

Nothing is assumed about the order in which blocks are evicted: a chain with a block missing in its middle ends there.
Long prompts are looked up at once by numpy, short ones one block after the other.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash

SHARED = "shared"
"""The name of the tier that all replicas read: what one of them stored there, all have."""

TIERS = (POOL, "ram", "disk", SHARED)
"""Fastest first; tiers of other names come behind these, in the order in which they are heard of."""

WORD = 64  # replicas in one word of a row
AT_ONCE = 96  # from so many blocks on, numpy looks them up
FIRST_ROWS = 1024

WORDS_OF_A_HASH = 4

Rows = NDArray[np.uint64]
ONE = np.uint64(1)


class BlockIndex:
    """The blocks of many replicas, which are known by their slots.

    >>> index = BlockIndex()
    >>> first, second = bytes(32), bytes([1] * 32)
    >>> index.add(0, [first, second])
    >>> index.add(1, [first])
    >>> index.add(1, [second], "disk")
    >>> index.matches([first, second], 2)
    [{'pool': 2}, {'pool': 1, 'disk': 1}]
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, int], int] = {(POOL, 0): 1}  # of a tier's words; column 0 has the tags
        self._tiers = [POOL]
        self._used = self._dead = 0  # rows with a tag; of these, rows without any bit
        self._keep(np.zeros((FIRST_ROWS, 2), np.uint64))

    def __len__(self) -> int:
        """Different blocks known."""
        return self._used - self._dead

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
                self._clear([event.tier], replica)

    def add(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """The replica has these blocks. To add a block again changes nothing."""
        offset, bit = self._place(replica, tier)
        for tag in _tags(block_hashes):
            if 5 * self._used >= 3 * len(self._table):
                self._rebuild()
            at = self._find(tag)
            if at < 0:
                at = ~at
                self._cells[at * self._width] = tag
                self._used += 1
            elif self._dead and not any(self._words(at)):
                self._dead -= 1
            self._cells[at * self._width + offset] |= bit

    def remove(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """The replica has these blocks no longer. To remove one that it has not changes nothing."""
        offset, bit = self._place(replica, tier)
        for tag in _tags(block_hashes):
            at = self._find(tag)
            if at >= 0 and self._cells[at * self._width + offset] & bit:
                self._cells[at * self._width + offset] ^= bit
                if not any(self._words(at)):
                    self._delete(at)

    def forget(self, replica: int) -> None:
        """Nothing of the replica is left in tiers of its own. Goes over the whole table."""
        self._clear([tier for tier in self._tiers if tier != SHARED], replica)

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
        for (tier, group), column in self._columns.items():
            holders[tier] |= words[column - 1] << (WORD * group)
        if holders.get(SHARED):
            holders[SHARED] = everyone
        return list(holders.values())

    def _look_up(self, block_hashes: Sequence[BlockHash]) -> Iterable[tuple[int, Sequence[int]]]:
        """How many consecutive blocks have the same words, and these."""
        if len(block_hashes) < AT_ONCE:
            nothing = [0] * (self._width - 1)
            for tag in _tags(block_hashes):
                at = self._find(tag)
                yield 1, (nothing if at < 0 else self._words(at))
            return
        found = self._gather(np.maximum(np.frombuffer(b"".join(block_hashes), np.uint64)[::WORDS_OF_A_HASH], ONE))
        changes = np.flatnonzero((found[1:] != found[:-1]).any(axis=1)) + 1
        starts = [0, *changes.tolist()]
        for start, stop in zip(starts, [*starts[1:], len(found)], strict=True):
            yield stop - start, found[start].tolist()

    def _gather(self, tags: Rows) -> Rows:
        """The words of each block; zeros for one that is not known."""
        tag_of = self._table[:, 0]
        at = (tags & np.uint64(self._mask)).view(np.intp)
        there = tag_of[at]
        wanted = np.flatnonzero((there != tags) & (there != 0))
        while len(wanted):
            at[wanted] = after = (at[wanted] + 1) & self._mask
            there = tag_of[after]
            wanted = wanted[(there != tags[wanted]) & (there != 0)]
        found: Rows = self._table.take(at, axis=0)[:, 1:]
        return found  # a free row has no bits

    def _find(self, tag: int) -> int:
        """The row with this tag, or ``~row`` of the free row where it would go."""
        cells, width, mask = self._cells, self._width, self._mask
        at = tag & mask
        while (found := cells[at * width]) != tag:
            if not found:
                return ~at
            at = (at + 1) & mask
        return at

    def _words(self, at: int) -> list[int]:
        return self._cells[at * self._width + 1 : (at + 1) * self._width].tolist()

    def _delete(self, at: int) -> None:
        """Free a row, and move those behind it that are then found no longer."""
        cells, width, mask = self._cells, self._width, self._mask
        after = at
        while tag := cells[(after := (after + 1) & mask) * width]:
            if (after - tag) & mask >= (after - at) & mask:
                cells[at * width : (at + 1) * width] = cells[after * width : (after + 1) * width]
                at = after
        cells[at * width : (at + 1) * width] = self._blank
        self._used -= 1

    def _clear(self, tiers: Sequence[str], replica: int) -> None:
        """Rows without a bit that are left are taken away when the table is rebuilt."""
        for tier in tiers:
            offset, bit = self._place(replica, tier)
            self._table[:, offset] &= ~np.uint64(bit)
        self._dead = self._used - int(np.count_nonzero(self._table[:, 1:].any(axis=1)))

    def _place(self, replica: int, tier: str) -> tuple[int, int]:
        """Column and bit of a replica in a tier; a column is added where none is free."""
        group, number = divmod(0 if tier == SHARED else replica, WORD)
        column = self._columns.get((tier, group))
        if column is None:
            column = self._columns[tier, group] = self._width
            if tier not in self._tiers:
                self._tiers.append(tier)
                self._tiers.sort(key=lambda each: TIERS.index(each) if each in TIERS else len(TIERS))
            self._keep(np.hstack([self._table, np.zeros((len(self._table), 1), np.uint64)]))
        return column, 1 << number

    def _rebuild(self) -> None:
        """Drop rows without a bit, and resize: at most a third of the new rows is used."""
        kept = self._table[self._table[:, 1:].any(axis=1)]
        rows = FIRST_ROWS
        while rows < 3 * len(kept):
            rows *= 2
        table = np.zeros((rows, self._width), np.uint64)
        tags = kept[:, 0]
        wanted, at = np.arange(len(kept)), tags & np.uint64(rows - 1)
        while len(wanted):
            free = table[at, 0] == 0
            table[at[free], 0] = tags[wanted[free]]  # of several for the same row, the last stays
            won = table[at, 0] == tags[wanted]
            table[at[won]] = kept[wanted[won]]
            wanted, at = wanted[~won], (at[~won] + ONE) & np.uint64(rows - 1)
        self._used, self._dead = len(kept), 0
        self._keep(table)

    def _keep(self, table: Rows) -> None:
        self._table = table
        self._width = table.shape[1]
        self._mask = len(table) - 1
        self._cells: memoryview[int] = table.reshape(-1).data
        self._blank: memoryview[int] = np.zeros(self._width, np.uint64).data


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
