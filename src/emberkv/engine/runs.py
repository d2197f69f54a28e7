"""What a pass computes: runs of new tokens, and which blocks of theirs are the same."""

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Run:
    """New tokens ``[start, start + count)`` of one sequence.

    slots: its block table, covering at least ``start + count`` tokens. decode: the one token is the sequence's latest,
    computed to continue it; otherwise the run is a piece of a prompt.
    """

    slots: list[int]
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
    in_order = sorted(range(len(full)), key=full.__getitem__)
    _, groups = _best_groups(in_order, full, 0, max(1, -(-min_tokens // block_size)))
    return sorted(groups)


def _best_groups(
    members: list[int], tables: list[list[int]], common: int, least: int
) -> tuple[int, list[tuple[list[int], int]]]:
    """The most block reads that can be saved among ``members``, and the groups that save them.

    members: in the order of their tables, which have the first ``common`` blocks in common. least: blocks of a group.
    """
    if len(members) < 2:
        return 0, []
    first, last = tables[members[0]], tables[members[-1]]
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    each = common if common >= least else 0
    apart, together = 0, -each
    deeper: list[tuple[list[int], int]] = []
    split: list[tuple[list[int], int]] = []
    rest: list[int] = []
    for key, some in groupby(members, key=lambda member: tables[member][common : common + 1]):
        branch = list(some)
        saved, groups = _best_groups(branch, tables, common, least) if key else (0, [])
        apart += saved
        split += groups
        if saved > len(branch) * each:
            together += saved
            deeper += groups
        else:
            together += len(branch) * each
            rest += branch
    if together <= apart:
        return apart, split
    return together, [*deeper, (sorted(rest), common)]
