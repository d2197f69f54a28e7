"""The ring: each member has a share, and one that joins or leaves moves no more than that."""

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


def test_a_ring_that_changes_is_the_ring_of_its_members() -> None:
    ring = HashRing(["a", "b", "c"])
    ring.leave("b")
    ring.join("d", 1)
    fresh = HashRing(["a", "d", "c"])
    assert [list(ring.order(key)) for key in KEYS] == [list(fresh.order(key)) for key in KEYS]


def test_a_ring_without_members_has_no_order() -> None:
    assert list(HashRing().order(b"key")) == []


def test_members_need_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="'a' with number 1"):
        HashRing(["a", "a"])


SEQUENCE_IDS = [f"test-seq-{number}".encode() for number in range(5000)]


def shares(workers: int) -> list[int]:
    ring = HashRing([f"worker-{number}" for number in range(workers)])
    return [next(ring.order(each)) for each in SEQUENCE_IDS]


@pytest.mark.parametrize(("workers", "most"), [*((count, 1.15) for count in range(2, 9)), (16, 1.25)])
def test_sequence_ids_are_spread_evenly(workers: int, most: float) -> None:
    counts = Counter(shares(workers))
    assert len(counts) == workers
    assert max(counts.values()) / (len(SEQUENCE_IDS) / workers) <= most


def test_a_fifth_worker_takes_its_share_and_nothing_else_moves() -> None:
    before, after = shares(4), shares(5)
    moved = [to for at, to in zip(before, after, strict=True) if at != to]
    assert set(moved) == {4}
    assert len(moved) / len(SEQUENCE_IDS) <= 0.22
