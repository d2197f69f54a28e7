"""The stack's depths, against a list that is searched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberkv.core.analytics.reuse_estimator import LRUStack

USES = st.lists(st.lists(st.integers(0, 40), unique=True, max_size=12), max_size=60)


@given(USES)
def test_a_depth_is_the_place_in_a_list_of_all_that_was_used_most_recent_first(uses: list[list[int]]) -> None:
    stack: LRUStack[int] = LRUStack()
    plain: list[int] = []
    for keys in uses:
        assert stack.depths(keys) == [plain.index(key) + 1 if key in plain else None for key in keys]
        stack.use(keys)
        plain = keys + [key for key in plain if key not in keys]
        assert len(stack) == len(plain)


def test_depths_stay_right_when_places_are_numbered_anew_many_times() -> None:
    stack: LRUStack[int] = LRUStack()
    for start in range(0, 100_000, 7):
        stack.use([start % 500, start % 500 + 1])
    plain = list(
        dict.fromkeys(key for start in reversed(range(0, 100_000, 7)) for key in (start % 500, start % 500 + 1))
    )
    assert stack.depths(plain) == list(range(1, len(plain) + 1))


def test_what_is_dropped_is_the_least_recent_and_no_longer_there() -> None:
    stack: LRUStack[str] = LRUStack()
    stack.use(["head", "tail"])
    stack.use(["other"])
    assert stack.drop_oldest() == "tail"
    assert stack.depths(["other", "head", "tail"]) == [1, 2, None]
    stack.use(["tail"])
    assert stack.depths(["tail", "other", "head"]) == [1, 2, 3]


def test_what_is_not_kept_no_longer_counts() -> None:
    stack: LRUStack[int] = LRUStack()
    stack.use(range(10))
    stack.use([4])
    stack.drop_unless(lambda key: key % 2 == 0)
    assert stack.depths([4, 0, 2, 6, 8, 1]) == [1, 2, 3, 4, 5, None]


def test_nothing_can_be_dropped_from_an_empty_stack() -> None:
    with pytest.raises(KeyError):
        LRUStack[str]().drop_oldest()
