"""The ring: everybody has a share, and who comes or goes moves no more than that."""

from collections import Counter

import pytest

from emberkv.cluster.hash_ring import HashRing
from emberkv.errors import ConfigError

KEYS = [number.to_bytes(4, "big") for number in range(4000)]


def owners(names: list[str]) -> dict[bytes, str]:
    ring = HashRing(names)
    return {key: names[next(ring.order(key))] for key in KEYS}


def test_shares_are_even() -> None:
    counts = Counter(owners([f"r{index}" for index in range(8)]).values())
    assert len(counts) == 8
    assert max(counts.values()) < 1.35 * len(KEYS) / 8


def test_a_member_that_goes_moves_its_own_keys_only() -> None:
    before, after = owners(["a", "b", "c", "d"]), owners(["a", "b", "d"])
    moved = {key for key in KEYS if before[key] != after[key]}
    assert moved == {key for key in KEYS if before[key] == "c"}


def test_an_order_has_every_member_once() -> None:
    ring = HashRing(["a", "b", "c"])
    orders = {tuple(ring.order(key)) for key in KEYS}
    assert {frozenset(order) for order in orders} == {frozenset({0, 1, 2})}
    assert len(orders) == 6


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_members_need_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="names must differ"):
        HashRing(names)
