"""The estimated curve, from the engine's news to Prometheus and JSON."""

import pytest
from prometheus_client import CollectorRegistry

from emberkv.core.block_pool import BlockPool
from emberkv.core.sequence import Sequence
from emberkv.engine.loop import CacheUpdate
from emberkv.serving.cache.ledger_store import MOST_WAITING, ReuseWatch, capacities_around
from emberkv.serving.metrics import ReuseCollector
from tests.core.harness import chain, store

RATIO, ERROR = "emberkv_estimated_hit_ratio", "emberkv_estimated_hit_ratio_error"


def admitted(*prompts: range) -> CacheUpdate:
    sequences = [Sequence(str(index), chain(prompt), 8) for index, prompt in enumerate(prompts)]
    return CacheUpdate(time=0.0, admitted=sequences, events=())


def test_sizes_around_a_pool_are_whole_blocks_and_none_comes_twice() -> None:
    assert capacities_around(1000) == [250, 500, 1000, 2000, 4000, 8000, 16000]
    assert capacities_around(1) == [1, 2, 4, 8, 16]


def test_prompts_are_looked_up_as_they_are_admitted() -> None:
    watch = ReuseWatch(num_blocks=2, block_bytes=1024)
    assert watch.curve() == []
    watch.on_update(admitted(range(9), range(100, 108), range(8)))  # two full blocks each, of four tokens
    assert [point.capacity_blocks for point in watch.curve()] == [1, 2, 4, 8, 16, 32]
    assert [point.hit_rate for point in watch.curve()] == pytest.approx([0, 0, 2 / 6, 2 / 6, 2 / 6, 2 / 6])


def test_an_answers_blocks_can_be_found_by_the_next_turn() -> None:
    pool = BlockPool(8, 4)
    store(pool, chain(range(16)))
    watch = ReuseWatch(num_blocks=8, block_bytes=1024)
    events = pool.events.since(0)
    assert events
    first, then = admitted(range(8)), admitted(range(16))
    watch.on_update(CacheUpdate(time=0.0, admitted=first.admitted, events=events))
    watch.on_update(then)
    assert watch.curve()[-1].hit_rate == pytest.approx(4 / 6)


def test_what_is_told_waits_until_it_is_to_be_taken_in() -> None:
    pool = BlockPool(8, 4)
    watch = ReuseWatch(num_blocks=8, block_bytes=1024)
    watch.on_update(admitted(range(8), range(100, 108), range(200, 208)))
    store(pool, chain(range(8)))
    watch.on_update(CacheUpdate(time=0.0, admitted=(), events=pool.events.since(0) or ()))
    assert watch.waiting == 5
    watch.apply_pending()
    assert watch.waiting == 0
    watch.on_update(admitted(range(8)))
    assert watch.curve()[-1].hit_rate == pytest.approx(2 / 8)
    assert watch.waiting == 0


def test_what_nobody_asks_for_is_taken_in_before_it_becomes_too_much() -> None:
    watch = ReuseWatch(num_blocks=8, block_bytes=1024)
    for _ in range(MOST_WAITING):
        watch.on_update(admitted(range(8)))
    assert watch.waiting == MOST_WAITING
    watch.on_update(admitted(range(8)))
    assert watch.waiting == 0
    assert watch.curve()[-1].hit_rate == pytest.approx(MOST_WAITING / (MOST_WAITING + 1))


def test_prometheus_and_json_tell_a_point_by_its_bytes() -> None:
    registry = CollectorRegistry()
    watch: ReuseWatch | None = None
    registry.register(ReuseCollector(lambda: watch))
    assert registry.get_sample_value(RATIO, {"cache_bytes": "4096"}) is None
    watch = ReuseWatch(num_blocks=4, block_bytes=1024)
    assert registry.get_sample_value(RATIO, {"cache_bytes": "4096"}) is None
    watch.on_update(admitted(range(8), range(8)))
    assert registry.get_sample_value(RATIO, {"cache_bytes": "4096"}) == 0.5
    assert registry.get_sample_value(RATIO, {"cache_bytes": "1024"}) == 0.25
    assert registry.get_sample_value(ERROR, {"cache_bytes": "4096"}) == 0
    assert watch.as_json()[2] == {
        "cache_bytes": 4096, "cache_blocks": 4, "estimated_hit_ratio": 0.5, "standard_error": 0,
    }  # fmt: skip
