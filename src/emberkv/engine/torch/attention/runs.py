"""What a pass computes: runs of new tokens, and which blocks of theirs are the same."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Run:
    """New tokens ``[start, start + count)`` of one sequence.

    block_ids: its block table, covering at least ``start + count`` tokens. decode: the one token is the sequence's
    latest, computed to continue it; otherwise the run is a piece of a prompt.
    """

    block_ids: list[int]
    start: int
    count: int
    decode: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.count


def shared_prefixes(
    tables: list[list[int]], lengths: list[int], block_size: int, min_tokens: int
) -> list[tuple[list[int], int]]:
    """Groups of sequences whose block tables begin alike, with the number of common full blocks of each group.

    A group has at least two members; its common blocks hold at least ``min_tokens``, none of them the new token. Of all
    ways to group the sequences, this one saves the most block reads: a group reads its common blocks once instead of
    once for each member.

    tables: block ids, where equal ids at one place follow equal ids. lengths: tokens, the new one included.
    """
    full = [table[: (length - 1) // block_size] for table, length in zip(tables, lengths, strict=True)]
    grouping = _PrefixTree(full, max(1, -(-min_tokens // block_size))).best()
    return sorted((sorted(members), blocks) for members, blocks in grouping.groups)


class _Grouping(NamedTuple):
    """groups: members and common blocks of each. loose: the members of none. value: block reads that are saved, and
    what the loose members are worth to a group nearer to the root.
    """

    value: int
    groups: tuple[tuple[list[int], int], ...]
    loose: tuple[int, ...]


class _PrefixTree:
    """Block tables as a tree. A node is a range of the tables in sorted order, which all begin with the same blocks.

    least: the fewest common blocks of a group.
    """

    def __init__(self, tables: list[list[int]], least: int) -> None:
        self._order = sorted(range(len(tables)), key=tables.__getitem__)
        self._sorted = [tables[index] for index in self._order]
        self._least = least
        self._known: dict[tuple[int, int, int], _Grouping] = {}

    def best(self) -> _Grouping:
        return self._best(0, len(self._order), 0, 0)

    def _best(self, start: int, stop: int, common: int, worth: int) -> _Grouping:
        """The best grouping of a node. worth: block reads that each loose member saves elsewhere.

        Either no group ends at the node, or one does, and takes all that its subtrees leave loose.
        """
        if stop - start < 2:
            return _Grouping(worth * (stop - start), (), tuple(self._order[start:stop]))
        key = (start, stop, worth)
        if key not in self._known:
            first, last = self._sorted[start], self._sorted[stop - 1]
            while common < min(len(first), len(last)) and first[common] == last[common]:
                common += 1
            grouping = self._of_subtrees(start, stop, common, worth)
            if common >= self._least:
                value, groups, members = self._of_subtrees(start, stop, common, common)
                if value - common > grouping.value:
                    grouping = _Grouping(value - common, (*groups, (list(members), common)), ())
            self._known[key] = grouping
        return self._known[key]

    def _of_subtrees(self, start: int, stop: int, common: int, worth: int) -> _Grouping:
        value, groups, loose = 0, list[tuple[list[int], int]](), list[int]()
        for key, indices in groupby(range(start, stop), key=lambda index: self._sorted[index][common : common + 1]):
            members = list(indices)
            if key:
                found = self._best(members[0], members[-1] + 1, common, worth)
            else:  # their tables end here
                found = _Grouping(worth * len(members), (), tuple(self._order[index] for index in members))
            value += found.value
            groups += found.groups
            loose += found.loose
        return _Grouping(value, tuple(groups), tuple(loose))
