"""Which blocks of a prompt are public: whole blocks of declared tokens only."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.core.hashing import PublicPrefixes

DECLARED = PublicPrefixes([[1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 9], [8]], block_size=2)


@pytest.mark.parametrize(
    ("prompt", "blocks"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 3),  # 7 begins a block that the declared prefix does not fill
        ([1, 2, 3, 4, 0, 0, 5, 6], 2),
        ([1, 2, 9, 9, 3, 4], 2),
        ([1, 2, 3], 1),
        ([1, 3, 3, 4], 0),
        ([8, 8], 0),
        ([1], 0),
        ([], 0),
    ],
)
def test_the_longest_run_of_declared_blocks_counts(prompt: list[int], blocks: int) -> None:
    assert DECLARED.blocks_of(prompt) == blocks


def test_without_declarations_nothing_is_public() -> None:
    assert PublicPrefixes([], block_size=1).blocks_of([1, 2, 3]) == 0


token_lists = st.lists(st.integers(0, 2), max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prefixes=st.lists(token_lists, max_size=4), prompt=token_lists, block_size=st.integers(1, 4))
def test_it_is_the_longest_common_beginning_in_whole_blocks(
    prefixes: list[list[int]], prompt: list[int], block_size: int
) -> None:
    common = [
        count
        for prefix in prefixes
        for count in range(min(len(prefix), len(prompt)) + 1)
        if prefix[:count] == prompt[:count] and count % block_size == 0
    ]
    assert PublicPrefixes(prefixes, block_size).blocks_of(prompt) == max(common, default=0) // block_size
