"""What a pass computes: runs of new tokens, and which blocks of theirs are the same."""

from dataclasses import dataclass


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
    """Groups of sequences whose tables begin alike, with the number of common full blocks (pure, on slot numbers).

    A group has at least two members; its common blocks hold at least ``min_tokens``, none of them the new token.
    """
    by_first: dict[int, list[int]] = {}
    for member, table in enumerate(tables):
        by_first.setdefault(table[0], []).append(member)
    groups = []
    for members in by_first.values():
        limit = min((lengths[m] - 1) // block_size for m in members)
        reference = tables[members[0]]
        for member in members[1:]:
            table = tables[member]
            limit = next((i for i in range(limit) if table[i] != reference[i]), limit)
        if len(members) > 1 and limit * block_size >= min_tokens:
            groups.append((members, limit))
    return groups
