"""The ledger's books: places, losses, and what is forgotten."""

import pytest

from emberkv.core.events import POOL
from emberkv.core.explaining.explanation import Loss, LossKind
from emberkv.core.explaining.ledger import Ledger
from emberkv.errors import ConfigError
from tests.core.harness import chain
from tests.core.ledgers import SIZE, asked, ledger_with, stored


def test_a_block_is_lost_when_it_leaves_its_last_place() -> None:
    cached = chain(range(4))
    ledger = ledger_with(cached)
    ledger.arrived("disk", cached.block_hashes)
    ledger.left(POOL, cached.block_hashes, now=2.0)
    assert ledger.tiers_of(cached.block_hashes[0]) == ["disk"]
    assert ledger.cached_run(cached) == 1
    ledger.left("disk", cached.block_hashes, now=3.0)
    assert ledger.cached_run(cached) == 0
    (miss, _) = asked(ledger, chain(range(5))).misses
    assert miss.loss == Loss("disk", 3.0, LossKind.EVICTED)
    ledger.arrived("disk", cached.block_hashes)
    assert ledger.cached_run(cached) == 1


def test_a_block_that_was_removed_stays_so_where_a_tier_that_was_not_known_to_have_it_has_lost_it() -> None:
    cached = chain(range(4))
    ledger = ledger_with(cached)
    ledger.left(POOL, cached.block_hashes, now=2.0, kind=LossKind.REMOVED)
    ledger.left("remote", cached.block_hashes, now=3.0)
    assert ledger.known(cached.block_hashes[0]).loss == Loss(POOL, 2.0, LossKind.REMOVED)


def test_the_last_place_known_to_have_lost_a_block_is_told() -> None:
    cached = chain(range(4))
    ledger = ledger_with(cached)
    ledger.left(POOL, cached.block_hashes, now=2.0)
    ledger.left("disk", cached.block_hashes, now=3.0)
    assert ledger.known(cached.block_hashes[0]).loss == Loss("disk", 3.0, LossKind.EVICTED)


def test_what_is_removed_leaves_every_place_and_later_news_does_not_say_otherwise() -> None:
    cached = chain(range(4))
    ledger = ledger_with(cached)
    ledger.arrived("disk", cached.block_hashes)
    ledger.removed(cached.block_hashes, now=2.0)
    ledger.left(POOL, cached.block_hashes, now=3.0)
    loss = ledger.known(cached.block_hashes[0]).loss
    assert loss is not None
    assert (loss.at, loss.kind) == (2.0, LossKind.REMOVED)


def test_what_was_evicted_before_is_not_removed_again() -> None:
    cached = chain(range(8))
    ledger = ledger_with(cached)
    ledger.left(POOL, cached.block_hashes[1:], now=2.0)
    ledger.removed(cached.block_hashes, now=5.0)
    losses = [ledger.known(block_hash).loss for block_hash in cached.block_hashes]
    assert losses == [Loss(POOL, 5.0, LossKind.REMOVED), Loss(POOL, 2.0, LossKind.EVICTED)]


def test_the_longest_lost_is_forgotten_first_and_then_the_oldest() -> None:
    ledger = Ledger(max_blocks=3)
    one, two, three, four, five = (chain([number] * SIZE) for number in range(5))
    for each in (one, two, three):
        ledger.apply(stored(each), 1.0)
    ledger.left(POOL, two.block_hashes, now=2.0)
    ledger.apply(stored(four), 3.0)
    assert [ledger.cached_run(each) for each in (one, two, three, four)] == [1, 0, 1, 1]
    assert ledger.get(two.block_hashes[0]) is None
    ledger.apply(stored(five), 4.0)
    assert ledger.get(one.block_hashes[0]) is None
    assert len(ledger) == 3
    ledger.left(POOL, one.block_hashes, now=5.0)  # what is forgotten is no error
    assert ledger.tiers_of(one.block_hashes[0]) == []


def test_a_ledger_must_remember_something() -> None:
    with pytest.raises(ConfigError, match="0 blocks"):
        Ledger(0)
