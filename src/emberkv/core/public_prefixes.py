"""Public prefixes: which leading blocks of a prompt hold nothing but what the operator has declared public."""

from collections.abc import Iterable, Sequence


class PublicPrefixes:
    """Declared token sequences, in whole blocks. The part of a block that a sequence's end leaves over is not public.

    A tree with a block's tokens on each branch: a prompt costs one dict look-up for each block that is public, and one
    more.
    """

    def __init__(self, prefixes: Iterable[Sequence[int]], block_size: int) -> None:
        self.block_size = block_size
        self._root: dict[tuple[int, ...], _Branches] = {}
        for tokens in prefixes:
            branches = self._root
            for start in range(0, len(tokens) - block_size + 1, block_size):
                branches = branches.setdefault(tuple(tokens[start : start + block_size]), {})

    def blocks_of(self, tokens: Sequence[int]) -> int:
        """How many of the first full blocks of ``tokens`` are those of one declared sequence."""
        branches, count = self._root, 0
        while True:
            start = count * self.block_size
            following = branches.get(tuple(tokens[start : start + self.block_size]))
            if following is None:
                return count
            branches, count = following, count + 1


_Branches = dict[tuple[int, ...], "_Branches"]
