"""An index of the blocks that each replica has, in its pool and in the tiers below it, built from its events.

The index is a hash table in numpy arrays. A row is a block: the first 8 bytes of its hash, and one 64-bit word for each
tier and each 64 replicas, with a bit for every replica that has the block. A row takes 16 bytes while there are at most
64 replicas and no lower tier, and at most 0.6 of the rows are in use. Two blocks with the same first 8 bytes are taken
for one. That is rare (one index in millions, at 10 million blocks), and then a request may be routed to a replica
without its prefix.

A tier that several replicas share, such as a server in the network, has one bit for all of them, and all such tiers
have one more word together. Its blocks are set and cleared by the events of any replica that shares it. The events of
two replicas come in no order between them, so where both have changed a block at about the same time, the index may go
by the earlier change.

Blocks may be evicted in any order, and a hit ends at the first missing block. A chain of at most ``WHOLE`` blocks
is looked up block by block. A longer one is sampled: every ``STRIDE``-th block is looked up, and then each block
between two samples that are held by different replicas. If the same replicas hold both samples, they are assumed to
hold the blocks between them. So a gap of ``STRIDE`` blocks or more is always found, and so is a gap next to the end of
any replica's hit, but a shorter gap may be missed. The replica that gets the request then computes the missing blocks,
which closes the gap.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emberkv.cluster.block_table import ONE, SWEPT_ROWS, BlockTable, Rows
from emberkv.core.events import POOL, AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash

TIERS = (POOL, "ram", "shm", "disk", "remote")
"""Fastest first. Tiers with other names follow these, in the order in which they first appear."""

WORD = 64
"""Replicas in one word of a row."""
AT_ONCE = 96
"""The number of blocks from which numpy is faster than a loop."""
WHOLE = 512
"""The largest number of blocks in a chain that is not sampled."""
STRIDE = 16
"""Blocks from one sample of a long chain to the next."""

WORDS_OF_A_HASH = 4

SWEPT_AT_ADD = 64
"""Rows in which forgotten columns are cleared for each added block: a whole table, long before it grows."""
MAX_FORGOTTEN = 64
"""Forgotten columns that wait; with more, all are cleared at once, which takes time linear in the table's size."""


class _Columns:
    """Numbers from 0 of bits in the rows, each in use or free. A free one is clean: no row has its bit."""

    def __init__(self) -> None:
        self._made = 0
        self._clean: list[int] = []

    def take(self) -> int:
        if self._clean:
            return self._clean.pop()
        self._made += 1
        return self._made - 1

    def give_back(self, column: int) -> None:
        self._clean.append(column)


@dataclass(slots=True, eq=False)
class _SharedTier:
    """A tier that several replicas share. column: its bit in the words of all shared tiers. members: their slots."""

    tier: str
    column: int
    members: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """A column whose bits are to be cleared. tier: in this tier alone; None: in all. is_in_use: the column is in use in
    other tiers. is_shared: it is one of a shared tier.
    """

    column: int
    tier: str | None = None
    is_in_use: bool = False
    is_shared: bool = False


class BlockIndex:
    """The blocks of many replicas, which are identified by their slots.

    probes: the number of blocks that `matches` has looked up.

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
        self._own_columns = _Columns()
        self._columns: dict[int, int] = {}  # by replica; a column is a bit of each of a tier's words
        self._apart: dict[tuple[int, str], int] = {}  # of tiers that were cleared since, each a column of its own
        self._shared_columns = _Columns()
        self._shared_words: list[int] = []  # numbers of the words of all shared tiers
        self._by_identity: dict[tuple[str, bytes], _SharedTier] = {}
        self._shared: dict[tuple[int, str], _SharedTier] = {}  # by replica and tier
        self._holders_of: dict[int, tuple[str, int]] | None = {}  # see `_shared_holders`; None: to be made anew
        self._forgotten: list[_Forgotten] = []  # bits that blocks may still have
        self._sweeping: list[_Forgotten] = []  # of these, those that are being cleared

    def __len__(self) -> int:
        """The number of distinct blocks, among them some of replicas that were forgotten lately."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Size of the table in bytes."""
        return self._table.nbytes

    def apply(self, replica: int, event: Event) -> None:
        """Apply one event of a replica. A replica's events must be applied in order."""
        match event:
            case BlockStored():
                self.add(replica, event.block_hashes, event.tier)
            case BlockRemoved():
                self.remove(replica, event.block_hashes, event.tier)
            case AllBlocksCleared():
                self.clear(replica, event.tier)

    def add(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """Record that the replica has these blocks. Adding a block twice has no effect."""
        self._sweep(len(block_hashes) * SWEPT_AT_ADD)
        word, bit = self._place(replica, tier)
        if len(block_hashes) < AT_ONCE:
            self._table.add(_tags(block_hashes), word, bit)
        else:
            self._table.add_many(_tag_array(block_hashes), word, bit)

    def remove(self, replica: int, block_hashes: Sequence[BlockHash], tier: str = POOL) -> None:
        """Record that the replica no longer has these blocks. Removing an unknown block has no effect."""
        self._table.remove(_tags(block_hashes), *self._place(replica, tier))

    def share(self, replica: int, tiers: Mapping[str, bytes]) -> None:
        """Say which of a replica's tiers it shares with all that have a tier of the same name and identity; the others
        are its own. What is in a shared tier is forgotten when the last replica does not share it any more.
        """
        for tier in [tier for slot, tier in self._shared if slot == replica]:
            if self._shared[replica, tier] is not self._by_identity.get((tier, tiers.get(tier, b""))):
                self._unshare(replica, tier)
        for tier, identity in tiers.items():
            if (replica, tier) in self._shared:
                continue
            self.clear(replica, tier)  # its own until now
            shared = self._by_identity.get((tier, identity))
            if shared is None:
                self._know(tier)
                shared = self._by_identity[tier, identity] = _SharedTier(tier, self._shared_columns.take())
            shared.members.add(replica)
            self._shared[replica, tier] = shared
        self._holders_of = None

    def _unshare(self, replica: int, tier: str) -> None:
        shared = self._shared.pop((replica, tier))
        shared.members.discard(replica)
        if not shared.members:
            self._by_identity = {key: each for key, each in self._by_identity.items() if each is not shared}
            self._forget([_Forgotten(shared.column, is_shared=True)])

    def leave(self, replica: int) -> None:
        """Remove all blocks of the replica; those in a tier that others share stay with these."""
        self.share(replica, {})
        self.forget(replica)

    def forget(self, replica: int) -> None:
        """Remove all blocks of the replica except those in tiers that it shares.

        The replica gets another column, and its former one is cleared in parts while blocks are added, so that no
        request waits for a pass over the whole table.
        """
        column = self._columns.pop(replica, None)
        if column is None:
            return
        self._holders_of = None
        forgotten = [_Forgotten(column)]
        for key in [key for key in self._apart if key[0] == replica]:
            forgotten.append(_Forgotten(self._apart.pop(key), key[1]))
        self._forget(forgotten)

    def clear(self, replica: int, tier: str) -> None:
        """Remove the replica's blocks in one tier; in a shared one, those of all that share it. As `forget`, in
        parts.
        """
        shared = self._shared.get((replica, tier))
        if shared is not None:
            before, shared.column = shared.column, self._shared_columns.take()
            self._holders_of = None
            self._forget([_Forgotten(before, is_shared=True)])
        elif tier in self._tiers and replica in self._columns:
            before = self._column_in(replica, tier)
            self._apart[replica, tier] = self._own_columns.take()
            self._forget([_Forgotten(before, tier, is_in_use=before == self._columns[replica])])

    def _forget(self, forgotten: list["_Forgotten"]) -> None:
        self._forgotten += forgotten
        self._sweep(SWEPT_ROWS)
        if len(self._forgotten) > MAX_FORGOTTEN:
            self._sweep(sys.maxsize)

    def _sweep(self, rows: int) -> None:
        """Clear forgotten bits in so many rows."""
        if not (self._sweeping or self._forgotten):
            return
        if not self._sweeping:
            self._sweeping, self._forgotten = self._forgotten, []
            bits: dict[int, int] = {}
            for each in self._sweeping:
                for word in self._words_of(each):
                    bits[word] = bits.get(word, 0) | 1 << each.column % WORD
            self._table.forget(bits)
        self._table.sweep(rows)
        if self._table.is_clean:
            for each in self._sweeping:
                if not each.is_in_use:
                    (self._shared_columns if each.is_shared else self._own_columns).give_back(each.column)
            self._sweeping = []

    def _words_of(self, forgotten: _Forgotten) -> Sequence[int]:
        """The numbers of the words in which blocks may have the column's bit."""
        group = forgotten.column // WORD
        if forgotten.is_shared:
            return self._shared_words[group : group + 1]
        tiers = self._tiers if forgotten.tier is None else (forgotten.tier,)
        return [self._words[tier, group] for tier in tiers if (tier, group) in self._words]

    def matches(self, block_hashes: Sequence[BlockHash], replicas: int) -> list[dict[str, int]]:
        """For each of the first ``replicas`` slots, the number of leading blocks that the replica has, by tier.

        A block counts for the fastest tier that holds it. Counting stops at the first block that no tier holds.
        """
        columns = [self._column(replica) for replica in range(replicas)]
        counts = _leading_blocks(self._tiers, columns, self._runs(block_hashes))
        return [counts.get(column, {}) for column in columns]

    def _runs(self, block_hashes: Sequence[BlockHash]) -> Iterable[tuple[int, Sequence[int]]]:
        """Runs of consecutive blocks with the same holders: each run's length, and for each tier the replicas that have
        its blocks, as bits.
        """
        one_word = self._one_word_of_each_tier()
        shared = self._shared_holders()
        for count, words in self._look_up(block_hashes):
            yield count, [words[number] for number in one_word] if one_word else self._holders(words, shared)

    def _one_word_of_each_tier(self) -> list[int]:
        """The numbers of the tiers' words where these say all that `_holders` does; else empty."""
        numbers = [self._words[tier, 0] for tier in self._tiers if (tier, 0) in self._words]
        is_all = len(numbers) == len(self._tiers) == len(self._words)
        return numbers if is_all and not (self._apart or self._shared) else []

    def _holders(self, words: Sequence[int], shared: Mapping[int, tuple[str, int]]) -> list[int]:
        """For each tier, the replicas that have a block, as the bits of an integer. words: the block's row. shared: see
        `_shared_holders`.
        """
        holders = dict.fromkeys(self._tiers, 0)
        for (tier, group), number in self._words.items():
            holders[tier] |= words[number] << (WORD * group)
        for (replica, tier), column in self._apart.items():
            bit = 1 << self._columns[replica]
            holders[tier] = holders[tier] & ~bit | (bit if holders[tier] >> column & 1 else 0)
        for group, number in enumerate(self._shared_words):
            for bit in _bits(words[number]):
                tier, replicas = shared.get(WORD * group + bit, (POOL, 0))  # else it is being cleared
                holders[tier] |= replicas
        return list(holders.values())

    def _shared_holders(self) -> Mapping[int, tuple[str, int]]:
        """By the column of a shared tier, its name and its replicas as bits. It is kept until one of them changes."""
        if self._holders_of is None:
            self._holders_of = {
                each.column: (each.tier, sum(1 << self._column(replica) for replica in each.members))
                for each in self._by_identity.values()
            }
        return self._holders_of

    def _look_up(self, block_hashes: Sequence[BlockHash]) -> Iterable[tuple[int, Sequence[int]]]:
        """Runs of consecutive blocks with the same words: each run's length, and the words."""
        if len(block_hashes) < AT_ONCE:
            for tag in _tags(block_hashes):
                self.probes += 1
                yield 1, self._table.words(tag)
            return
        if len(block_hashes) <= WHOLE:
            found = self._gather(block_hashes)
            starts = [0, *(_changes(found) + 1).tolist()]
            words = found[:, starts].T.tolist()
        else:
            starts, words = self._sampled(block_hashes)
        for start, stop, each in zip(starts, [*starts[1:], len(block_hashes)], words, strict=True):
            yield stop - start, each

    def _sampled(self, block_hashes: Sequence[BlockHash]) -> tuple[list[int], list[list[int]]]:
        """Where runs of blocks with the same words start, and their words. The blocks between two samples with the same
        words are taken to have these.
        """
        last = len(block_hashes) - 1
        samples = self._gather([*block_hashes[:last:STRIDE], block_hashes[last]])
        changes = _changes(samples)
        between: list[BlockHash] = []
        for sample in changes.tolist():
            between += block_hashes[sample * STRIDE + 1 : (sample + 1) * STRIDE]
        missing = len(changes) * (STRIDE - 1) - len(between)  # the last step may be shorter
        between += [block_hashes[last]] * missing
        self.probes -= missing
        found = np.empty((len(samples), len(changes), STRIDE + 1), np.uint64)  # from sample to sample
        found[:, :, 0], found[:, :, STRIDE] = samples[:, changes], samples[:, changes + 1]
        found[:, :, 1:STRIDE] = self._gather(between).reshape(len(samples), len(changes), STRIDE - 1)
        step, at = (found[:, :, 1:] != found[:, :, :-1]).any(axis=0).nonzero()
        starts = changes[step] * STRIDE + at + 1
        return [0, *starts.tolist()], [samples[:, 0].tolist(), *found[:, step, at + 1].T.tolist()]

    def _gather(self, block_hashes: Sequence[BlockHash]) -> Rows:
        self.probes += len(block_hashes)
        return self._table.gather(_tag_array(block_hashes))

    def _column(self, replica: int) -> int:
        """The replica's column, which is a clean one if it has had none."""
        column = self._columns.get(replica)
        if column is None:
            column = self._columns[replica] = self._own_columns.take()
        return column

    def _column_in(self, replica: int, tier: str) -> int:
        """The column of a replica's blocks in a tier of its own."""
        apart = self._apart.get((replica, tier))
        return self._column(replica) if apart is None else apart

    def _place(self, replica: int, tier: str) -> tuple[int, int]:
        """The word's number and the bit of a replica in a tier. A word is added if there is none for the replica."""
        shared = self._shared.get((replica, tier))
        if shared is not None:
            group, number = divmod(shared.column, WORD)
            while group >= len(self._shared_words):
                self._shared_words.append(self._table.add_word())
            return self._shared_words[group], 1 << number
        group, number = divmod(self._column_in(replica, tier), WORD)
        word = self._words.get((tier, group))
        if word is None:
            word = self._words[tier, group] = self._table.add_word()
            self._know(tier)
        return word, 1 << number

    def _know(self, tier: str) -> None:
        if tier not in self._tiers:
            self._tiers.append(tier)
            self._tiers.sort(key=lambda each: TIERS.index(each) if each in TIERS else len(TIERS))


def _changes(rows: Rows) -> NDArray[np.intp]:
    """Where the next block has other words. rows: uint64 ``[words, blocks]``."""
    differ = rows[:, 1:] != rows[:, :-1]
    changes: NDArray[np.intp] = (differ[0] if len(rows) == 1 else differ.any(axis=0)).nonzero()[0]
    return changes


def _leading_blocks(
    tiers: Sequence[str], columns: Sequence[int], runs: Iterable[tuple[int, Sequence[int]]]
) -> dict[int, dict[str, int]]:
    """By column, the number of leading blocks that its replica has in each tier, where it has any. columns: those that
    count. runs: see `BlockIndex._runs`.
    """
    counts: dict[int, dict[str, int]] = {}
    began: list[dict[int, int]] = [{} for _ in tiers]  # of each column's present run
    served = [0] * len(tiers)  # the columns whose present run is in each tier
    going = sum([1 << column for column in columns])  # those without a gap so far
    depth = 0

    def change(tier: int, now: int) -> None:
        name, begins = tiers[tier], began[tier]
        for column in _bits(served[tier] & ~now):
            count = counts.setdefault(column, {})
            count[name] = count.get(name, 0) + depth - begins[column]
        for column in _bits(now & ~served[tier]):
            begins[column] = depth
        served[tier] = now

    for count, holders in runs:
        left = going
        for tier, having in enumerate(holders):
            now = left & having
            left ^= now
            if now != served[tier]:
                change(tier, now)
        going ^= left
        depth += count
        if not going:
            break
    for tier in range(len(tiers)):
        change(tier, 0)
    return counts


def _bits(bits: int) -> list[int]:
    """The positions of the set bits, lowest first."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found


def _tags(block_hashes: Sequence[BlockHash]) -> list[int]:
    """The first 8 bytes of each hash as an integer; 1 instead of 0, which marks a free row."""
    return [tag or 1 for tag in memoryview(b"".join(block_hashes)).cast("Q")[::WORDS_OF_A_HASH].tolist()]


def _tag_array(block_hashes: Sequence[BlockHash]) -> Rows:
    """`_tags` as an array, uint64 ``[blocks]``."""
    return np.maximum(np.frombuffer(b"".join(block_hashes), np.uint64)[::WORDS_OF_A_HASH], ONE)
