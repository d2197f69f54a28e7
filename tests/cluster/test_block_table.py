"""The table agrees with a dictionary, at any stage of its growth."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emberkv.cluster.block_table import BlockTable

TAGS = [(number << 32) + home for number in range(1, 13) for home in (0, 1, 2, 7, 61, 62, 63, 127, 255)]
"""They collide in tables of any size, and at the end of the rows."""
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add_many", "add_many", "remove", "clear", "widen"]),
        st.lists(st.sampled_from(TAGS), max_size=24),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=24,
)


def array(tags: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array(tags, np.uint64)


@given(CHANGES)
def test_bits_are_those_of_a_dictionary(changes: list[tuple[str, list[int], int, int]]) -> None:
    table, words = BlockTable(words=1, slice_blocks=2), 1
    held: dict[tuple[int, int], int] = {}
    for change, tags, highest, number in changes:
        word, bit = min(highest, words - 1), 1 << number
        match change:
            case "add":
                table.add(tags, word, bit)
                held.update({(tag, word): held.get((tag, word), 0) | bit for tag in tags})
            case "add_many":
                table.add_many(array(tags), word, bit)
                held.update({(tag, word): held.get((tag, word), 0) | bit for tag in tags})
            case "remove":
                table.remove(tags, word, bit)
                held.update({(tag, word): held.get((tag, word), 0) & ~bit for tag in tags})
            case "clear":
                table.forget({word: bit})
                table.sweep(1 << 30)
                held = {(tag, at): bits & ~bit if at == word else bits for (tag, at), bits in held.items()}
            case "widen" if words < 3:
                assert table.add_word() == words
                words += 1
        expected = [[held.get((tag, at), 0) for at in range(words)] for tag in TAGS]
        assert [table.words(tag) for tag in TAGS] == expected
        assert table.gather(array(TAGS)).T.tolist() == expected
        assert len(table) == sum(any(bits) for bits in expected)


SWEEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add_many", "remove", "forget", "sweep", "clear"]),
        st.lists(st.sampled_from(TAGS), max_size=24),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(SWEEPS)
def test_forgotten_bits_go_in_parts_and_no_others(changes: list[tuple[str, list[int], int]]) -> None:
    table, column = BlockTable(words=2, slice_blocks=2), 1
    held: dict[int, int] = {}  # the bits in use; each forgotten one is followed by the next
    for change, tags, count in changes:
        bit = 1 << count % 2 if count < 2 else 1 << (column + 1)
        match change:
            case "add":
                table.add(tags, 1, bit)
                held.update({tag: held.get(tag, 0) | bit for tag in tags})
            case "add_many":
                table.add_many(array(tags), 1, bit)
                held.update({tag: held.get(tag, 0) | bit for tag in tags})
            case "remove":
                table.remove(tags, 1, bit)
                held.update({tag: held.get(tag, 0) & ~bit for tag in tags})
            case "clear" if table.is_clean:
                table.forget({1: bit})
                table.sweep(1 << 30)
                held = {tag: bits & ~bit for tag, bits in held.items()}
            case "forget" if table.is_clean:
                forgotten = 1 << (column + 1)
                table.forget({1: forgotten})
                held = {tag: bits & ~forgotten for tag, bits in held.items()}
                column += 1
            case "sweep":
                table.sweep(8 * count)
        used = 0b11 | 1 << (column + 1)
        assert [table.words(tag)[1] & used for tag in TAGS] == [held.get(tag, 0) for tag in TAGS]
    table.sweep(1 << 30)
    assert table.is_clean
    assert [table.words(tag) for tag in TAGS] == [[0, held.get(tag, 0)] for tag in TAGS]
    assert len(table) == sum(map(bool, held.values()))


def test_a_block_whose_last_bits_a_removal_clears_does_not_count_after_the_sweep() -> None:
    table = BlockTable(words=1, slice_blocks=2)
    table.add([1], 0, 0b01)
    table.add([17], 0, 0b10)  # its search begins at the same row
    table.forget({0: 0b10})
    table.remove([1], 0, 0b01)
    table.sweep(1 << 30)
    assert len(table) == 0


def test_growing_moves_a_part_of_the_rows_at_a_time() -> None:
    table = BlockTable(words=1)
    sizes = []
    for number in range(30_000):
        table.add([(number << 20) + number * 7], 0, 1)
        sizes.append(table.nbytes)
    freed = max(at for at in range(1, len(sizes)) if sizes[at] < sizes[at - 1])
    doubled = max(at for at in range(1, freed) if sizes[at] > sizes[at - 1])
    assert freed - doubled > 1000, "the rows were moved while blocks were added"
    assert [table.words((number << 20) + number * 7) for number in range(30_000)] == [[1]] * 30_000
