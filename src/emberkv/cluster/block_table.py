"""A hash table from blocks to bits, which is resized incrementally.

It uses open addressing with linear probing. A block is identified by its tag, 8 bytes of its hash; the tag 0 marks a
free row. The tags and each word of bits are separate arrays, so adding a word copies nothing.

Bits that are no longer used are cleared in parts, too (`BlockTable.forget`, `BlockTable.sweep`).

To grow, the table allocates new rows. Each call that adds blocks moves some of the old rows to them, in order of their
positions, so no call waits for the whole move. A move ends at a free row. So the blocks that hash to the rows moved so
far are in the new rows, and all others are in the old ones: each block has exactly one place.
"""

import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SLICE = 128
"""The number of added blocks after which some rows are moved. The table begins with eight times as many rows."""
MOVED_ROWS = 16
"""Rows moved for each added block, so that the move ends long before the new rows are full."""
PAGE_ROWS = mmap.PAGESIZE // 8
"""Rows in one page of memory."""
SWEPT_ROWS = 1 << 16
"""Rows that `BlockTable.clear` and `BlockTable.sweep` process at once."""
WINDOW = np.arange(8)
"""Offsets of the rows that are compared at once. Their tags fill a cache line of 64 bytes."""

Rows = NDArray[np.uint64]
Positions = NDArray[np.intp]
ONE = np.uint64(1)


class _Rows:
    """A fixed number of rows, a power of 2.

    tags: uint64 ``[rows]``. words: arrays of bits, each uint64 ``[rows]``; a free row has no bits.
    """

    def __init__(self, rows: int, words: int) -> None:
        self.used = 0  # rows with a tag
        self.mask = rows - 1
        self._memory: list[mmap.mmap] = []
        self.tags = self._array(rows)
        self.words: list[Rows] = []
        self.tag_cells: memoryview[int] = self.tags.data
        self.word_cells: list[memoryview[int]] = []
        for _ in range(words):
            self.add_word()

    def __len__(self) -> int:
        return len(self.tags)

    def add_word(self) -> None:
        self.words.append(self._array(len(self.tags)))
        self.word_cells.append(self.words[-1].data)

    def _array(self, rows: int) -> Rows:
        """Zeros, uint64 ``[rows]``, in small pages that are mapped when written. Mapping a huge page can take 20 ms."""
        memory = mmap.mmap(-1, 8 * rows, flags=mmap.MAP_PRIVATE)
        if sys.platform == "linux":
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory.append(memory)
        return np.frombuffer(memory, np.uint64)

    def release(self, begin: int, end: int) -> None:
        """Return the memory of the free rows ``[begin, end)``, both multiples of `PAGE_ROWS`, to the system. Returning
        all of it at once would take long.
        """
        if sys.platform == "linux" and begin < end:
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED, 8 * begin, 8 * (end - begin))

    def find(self, tag: int) -> int:
        """The row with this tag, or ``~row`` of the free row where it would be inserted."""
        cells, mask = self.tag_cells, self.mask
        at = tag & mask
        while (found := cells[at]) != tag:
            if not found:
                return ~at
            at = (at + 1) & mask
        return at

    def homes(self, tags: Rows) -> Positions:
        """The rows at which the search for tags begins."""
        return (tags & np.uint64(self.mask)).view(np.intp)

    def find_many(self, tags: Rows) -> Positions:
        """For each tag, the row with it, or the free row where it would be inserted."""
        at = self.homes(tags)
        there = self.tags.take(at)
        wanted = ((there != tags) & (there != 0)).nonzero()[0]
        while len(wanted):
            sought = tags.take(wanted)[:, None]
            there = self.tags.take((at.take(wanted)[:, None] + WINDOW) & self.mask)
            ends = (there == sought) | (there == 0)
            ends[:, -1] = True  # the next window begins there
            steps = ends.argmax(axis=1)
            at[wanted] += steps
            wanted = wanted[steps == len(WINDOW) - 1]
        at &= self.mask
        return at

    def first_free(self, at: int = 0) -> int:
        """The first free row from ``at`` on. The result may exceed the number of rows; then it wraps around."""
        while self.tag_cells[at & self.mask]:
            at += 1
        return at

    def insert(self, at: int, tag: int) -> None:
        self.tag_cells[at] = tag
        self.used += 1

    def insert_many(self, tags: Rows, positions: Positions) -> Positions:
        """Insert distinct tags that are not in the rows yet, and return their rows.

        positions: for each tag its home, or the free row that `find_many` returned. The array is overwritten with the
        result.
        """
        wanted = np.arange(len(tags))
        while len(wanted):
            at = positions[wanted]
            free = self.tags[at] == 0
            self.tags[at[free]] = tags[wanted[free]]  # of several for the same row, the last stays
            wanted = wanted[self.tags[at] != tags[wanted]]
            positions[wanted] = (positions[wanted] + 1) & self.mask
        self.used += len(tags)
        return positions

    def is_dead(self, at: int) -> bool:
        """Whether the row has no bits."""
        return not any(cells[at] for cells in self.word_cells)

    def dead(self, at: slice | Positions) -> NDArray[np.bool_]:
        """`is_dead` for several rows."""
        dead: NDArray[np.bool_] = self.words[0][at] == 0
        for words in self.words[1:]:
            dead &= words[at] == 0
        return dead

    def delete(self, at: int, stale: Mapping[int, int]) -> int:
        """Free a row, and move later rows of its probe sequence back so that they are still found. stale: bits by word
        that the moved rows lose, as they may get to where a sweep has been. Returns how many have no bits any more.
        """
        tags, mask = self.tag_cells, self.mask
        after, died = at, 0
        while tag := tags[(after := (after + 1) & mask)]:
            if (after - tag) & mask >= (after - at) & mask:
                was_dead = bool(stale) and self.is_dead(after)
                tags[at] = tag
                for number, words in enumerate(self.word_cells):
                    words[at] = words[after] & ~stale.get(number, 0)
                died += bool(stale) and not was_dead and self.is_dead(at)
                at = after
        tags[at] = 0
        for words in self.word_cells:
            words[at] = 0
        self.used -= 1
        return died


class BlockTable:
    """The bits of blocks, in 64-bit words. A block without any bit is not in the table.

    words: the number of words of each block. slice_blocks: the number of added blocks after which some rows are moved.

    >>> table = BlockTable(words=1)
    >>> table.add([7, 8], 0, 0b10)
    >>> table.words(7), table.words(9), len(table)
    ([2], [0], 2)
    """

    def __init__(self, words: int, *, slice_blocks: int = SLICE) -> None:
        self._words = words
        self._slice = slice_blocks
        self._rows = _Rows(8 * slice_blocks, words)
        self._next: _Rows | None = None  # the new rows, during a move
        self._start = 0  # a row that was free when moving began; rows are moved from there on
        self._moved = 0  # rows that were moved
        self._owed = 0  # rows to move at the next step
        self._dead = 0  # rows with a tag and without bits; moving leaves them behind
        self._stale: dict[int, int] = {}  # bits that are being cleared, by word
        self._unswept: list[tuple[_Rows, int]] = []  # rows that may have them from that position on

    def __len__(self) -> int:
        """The number of blocks with at least one bit. A bit that `sweep` has not yet cleared counts."""
        return self._used - self._dead

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return sum(each.nbytes for rows in self._all_rows() for each in (rows.tags, *rows.words))

    def add_word(self) -> int:
        """Add a word to each block, and return the word's number."""
        for rows in self._all_rows():
            rows.add_word()
        self._words += 1
        return self._words - 1

    def words(self, tag: int) -> list[int]:
        """The words of a block."""
        rows = self._rows_of(tag)
        at = rows.find(tag)
        return [0] * self._words if at < 0 else [cells[at] for cells in rows.word_cells]

    def gather(self, tags: Rows) -> Rows:
        """The words of many blocks, uint64 ``[words, blocks]``. tags: uint64 ``[blocks]``."""
        found = np.empty((self._words, len(tags)), np.uint64)
        for rows, chosen in self._split(tags):
            at = rows.find_many(tags[chosen])
            for number, words in enumerate(rows.words):
                found[number, chosen] = words.take(at)
        return found

    def add(self, tags: Sequence[int], word: int, bit: int) -> None:
        """Set a bit of blocks. word: the word's number. bit: an integer with that bit set."""
        for begin in range(0, len(tags), self._slice):
            added = tags[begin : begin + self._slice]
            self._move_some(len(added))
            rows, moving = self._rows, self._next is not None
            for tag in added:
                if moving:
                    rows = self._rows_of(tag)
                at = rows.find(tag)
                if at < 0:
                    at = ~at
                    rows.insert(at, tag)
                elif self._dead and rows.is_dead(at):
                    self._dead -= 1
                rows.word_cells[word][at] |= bit

    def add_many(self, tags: Rows, word: int, bit: int) -> None:
        """`add` for many blocks, vectorized. tags: uint64 ``[blocks]``."""
        for begin in range(0, len(tags), self._slice):
            added = np.sort(tags[begin : begin + self._slice])
            added = added[np.append(True, added[1:] != added[:-1])]
            self._move_some(len(added))
            for rows, chosen in self._split(added):
                mine = added[chosen]
                at = rows.find_many(mine)
                known = rows.tags[at] == mine
                if self._dead:
                    self._dead -= int(np.count_nonzero(rows.dead(at[known])))
                at[~known] = rows.insert_many(mine[~known], at[~known])
                rows.words[word][at] |= np.uint64(bit)

    def remove(self, tags: Sequence[int], word: int, bit: int) -> None:
        """Clear a bit of blocks, if it is set."""
        for tag in tags:
            rows = self._rows_of(tag)
            at = rows.find(tag)
            if at >= 0 and rows.word_cells[word][at] & bit:
                rows.word_cells[word][at] ^= bit
                if rows.is_dead(at):
                    self._dead += rows.delete(at, self._stale)

    def forget(self, bits: Mapping[int, int]) -> None:
        """Begin to clear bits, by word, which must not be added again before `is_clean`. Until then, `words` and
        `gather` may still give them. Only after an earlier call is done.
        """
        assert self.is_clean, "bits are forgotten one after another"
        self._stale = dict(bits)
        self._unswept = [(rows, 0) for rows in self._all_rows()]

    @property
    def is_clean(self) -> bool:
        """Whether all bits that `forget` was given are cleared."""
        return not self._stale

    def sweep(self, count: int) -> None:
        """Clear the bits that `forget` was given in the next ``count`` rows. Moving a row clears them, too."""
        while self._stale and count > 0:
            rows, begin = self._unswept.pop()
            if any(rows is each for each in self._all_rows()):
                part = slice(begin, min(begin + count, begin + SWEPT_ROWS, len(rows)))
                self._dead += self._strip(rows, part)
                count -= part.stop - begin
                if part.stop < len(rows):
                    self._unswept.append((rows, part.stop))
            if not self._unswept:
                self._stale = {}

    def _strip(self, rows: _Rows, at: slice | Positions) -> int:
        """Clear the bits that `forget` was given in some rows. Returns how many rows have no bits any more."""
        if not self._stale:
            return 0
        before = int(np.count_nonzero(rows.dead(at)))
        for word, bits in self._stale.items():
            rows.words[word][at] &= ~np.uint64(bits)
        return int(np.count_nonzero(rows.dead(at))) - before

    @property
    def _used(self) -> int:
        return sum(rows.used for rows in self._all_rows())

    def _all_rows(self) -> tuple[_Rows, ...]:
        return (self._rows,) if self._next is None else (self._rows, self._next)

    def _rows_of(self, tag: int) -> _Rows:
        """The rows in which a block is, or would be inserted."""
        following = self._next
        if following is None or (tag - self._start) & self._rows.mask >= self._moved:
            return self._rows
        return following

    def _split(self, tags: Rows) -> Iterator[tuple[_Rows, slice | NDArray[np.bool_]]]:
        """`_rows_of` for many tags: each of the rows, with the selection of the tags in it."""
        if self._next is None:
            yield self._rows, slice(None)
            return
        moved = ((tags - np.uint64(self._start)) & np.uint64(self._rows.mask)) < np.uint64(self._moved)
        yield self._next, moved
        yield self._rows, ~moved

    def _move_some(self, added: int) -> None:
        """Begin a move when 0.6 of the rows are in use, and move some rows for each block that will be added."""
        if self._next is None:
            if 5 * self._rows.used < 3 * len(self._rows):
                return
            more = 10 * len(self) >= 3 * len(self._rows)
            self._next = _Rows(len(self._rows) * (2 if more else 1), self._words)
            self._start = self._rows.first_free()
            self._moved, self._owed = 0, self._slice * MOVED_ROWS
        self._owed += added * MOVED_ROWS
        if self._owed >= self._slice * MOVED_ROWS:
            self._move(self._owed)
            self._owed = 0

    def _move(self, count: int) -> None:
        """Move at least ``count`` rows, up to a free one."""
        rows, following = self._rows, self._next
        assert following is not None, "rows are moved to others"
        stop = rows.first_free(self._start + min(self._moved + count, len(rows)))
        at = np.arange(self._start + self._moved, stop) & rows.mask
        self._dead += self._strip(rows, at)
        tags, dead = rows.tags[at], rows.dead(at)
        live = tags[~dead]
        to = following.insert_many(live, following.homes(live))
        for words, new_words in zip(rows.words, following.words, strict=True):
            new_words[to] = words[at[~dead]]
            words[at] = 0
        rows.tags[at] = 0
        used = int(np.count_nonzero(tags))
        rows.used -= used
        self._dead -= used - len(to)
        begin = max(self._start + PAGE_ROWS - 1, self._start + self._moved) // PAGE_ROWS * PAGE_ROWS
        rows.release(begin, min(stop, len(rows)) // PAGE_ROWS * PAGE_ROWS)
        self._moved = stop - self._start
        if self._moved >= len(rows):
            self._rows, self._next = following, None
