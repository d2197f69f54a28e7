"""The builder: accesses made of small chains, and the real trace."""

from collections.abc import Sequence
from hashlib import sha256

from hypothesis import strategies as st

from emberkv.sim.curves import Access

CAPACITIES = (1_000, 3_000, 6_000, 10_000, 30_000, 50_000, 100_000)


def visit_of(path: Sequence[int], *, asked: int | None = None, block_size: int = 4) -> Access:
    """Blocks named by the path of choices that leads to them; ``asked`` of them are the prompt's, all unless given."""
    blocks = [sha256(repr(tuple(path[: end + 1])).encode()).digest() for end in range(len(path))]
    asked = len(path) if asked is None else asked
    return Access(blocks, asked, asked * block_size, block_size)


@st.composite
def visit_lists(draw: st.DrawFn) -> list[Access]:
    """Chains of up to 6 blocks that branch three ways at each, so that prefixes are shared; answers included."""
    accesses = []
    for path in draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=50)):
        accesses.append(visit_of(path, asked=draw(st.integers(0, len(path)))))
    return accesses
