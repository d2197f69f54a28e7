"""What a server's start does to the process."""

import gc
from collections.abc import Iterator
from importlib.resources import files

import pytest

from emberkv.cli.gateway import frozen_tokenizer
from emberkv.cli.startup import gc_frozen
from emberkv.cluster.wire import TokenizerFiles


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_the_start_makes_is_left_alone_by_the_collector(thawed: None) -> None:
    with gc_frozen():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made)


def test_a_start_that_fails_leaves_the_collector_as_it_was(thawed: None) -> None:
    with pytest.raises(ValueError, match="no model"), gc_frozen():
        raise ValueError("no model")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_gateways_tokenizer_is_left_alone_by_the_collector(thawed: None) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    content = {name: (files("emberkv") / "demo_model" / name).read_bytes() for name in names}
    tokenizer = frozen_tokenizer(TokenizerFiles(etag="t", files=content))
    assert tokenizer.encode("a story", add_special_tokens=False)
    assert gc.isenabled()
    assert all(each is not tokenizer for each in gc.get_objects())
