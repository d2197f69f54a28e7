"""What a foreign worker is assumed to have cached: what an LRU cache of its size would have, as far as it says."""

from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.cluster.foreign.worker import SLACK_BLOCKS, AssumedBlocks
from emberkv.core.events import BlockRemoved, BlockStored, Event
from emberkv.core.hashing import TokenChain

ROOT = bytes(32)


def chain(tokens: Sequence[int]) -> TokenChain:
    return TokenChain(ROOT, tokens, 1)


class Published:
    """The blocks that events tell of; an event that changes nothing is a fault."""

    def __init__(self) -> None:
        self.hashes: set[bytes] = set()

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    assert not self.hashes & set(event.block_hashes)
                    self.hashes |= set(event.block_hashes)
                case BlockRemoved():
                    assert self.hashes >= set(event.block_hashes)
                    self.hashes -= set(event.block_hashes)


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=20)


@settings(max_examples=80, deadline=None)
@given(PROMPTS, st.integers(1, 8))
def test_it_is_an_lru_cache_of_the_workers_size_whose_prompts_go_from_their_ends(
    prompts: list[list[int]], size: int
) -> None:
    published = Published()
    assumed = AssumedBlocks(published, max_blocks=size, ttl=1e9)
    model: OrderedDict[bytes, None] = OrderedDict()
    for now, tokens in enumerate(prompts):
        hashes = chain(tokens).block_hashes
        held = assumed.held(chain(tokens))
        run = next((at for at, each in enumerate(hashes) if each not in model), len(hashes))
        assert held.blocks == run
        assumed.computed(chain(tokens), float(now))
        for each in reversed(hashes[:size]):
            model[each] = None
            model.move_to_end(each)
        while len(model) > size:
            model.popitem(last=False)
        assert published.hashes == set(model)
        assert len(assumed) == len(model)


def test_what_is_not_used_for_long_is_given_up() -> None:
    published = Published()
    assumed = AssumedBlocks(published, max_blocks=100, ttl=10.0)
    assumed.computed(chain([1, 2]), 0.0)
    assumed.computed(chain([1, 3]), 5.0)
    assumed.expire(11.0)
    assert published.hashes == set(chain([1, 3]).block_hashes)
    assumed.clear()
    assert not published.hashes


def test_with_a_lost_block_goes_what_was_used_no_later() -> None:
    published = Published()
    assumed = AssumedBlocks(published, max_blocks=100, ttl=1e9)
    old, long, new = chain([9, 9]), chain(list(range(10, 20))), chain([7, 7])
    for now, each in enumerate((old, long, new)):
        assumed.computed(each, float(now))
    held = assumed.held(long)
    assert assumed.corrected(held, len(long) - SLACK_BLOCKS) == 0
    assumed.computed(long, 3.0)
    assert assumed.corrected(held, 0) == len(old)
    assert published.hashes == {*long.block_hashes, *new.block_hashes}
