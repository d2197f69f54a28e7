"""What a server's start does to the process."""

import gc
from collections.abc import Iterator

import pytest

from emberkv.cli.startup import made_to_stay


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_the_start_makes_is_left_alone_by_the_collector(thawed: None) -> None:
    with made_to_stay():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made)


def test_a_start_that_fails_leaves_the_collector_as_it_was(thawed: None) -> None:
    with pytest.raises(ValueError, match="no model"), made_to_stay():
        raise ValueError("no model")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
