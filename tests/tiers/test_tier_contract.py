"""What every tier does alike."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from emberkv.core.policies.eviction import FIFO
from emberkv.tiers.base import RemovalResult, TierEntry
from tests.tiers.build import entries, inexact
from tests.tiers.contract import BLOCKS, ENTRIES, IDS, MakeTier, has, put
from tests.waiting import DEADLINE


def test_what_is_stored_comes_back(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.store(ENTRIES[:5]).count == 5
    assert tier.load(IDS[:5]) == ENTRIES[:5]
    assert tier.load([IDS[3], IDS[9], IDS[0]]) == [ENTRIES[3], None, ENTRIES[0]]


def test_a_query_counts_the_first_run(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, 0, 1, 3)
    assert [tier.query(IDS[start:]) for start in range(5)] == [2, 1, 0, 1, 0]
    assert tier.query([]) == 0


def test_empty_batches(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.load([]) == []
    assert tier.store([]).count == 0
    assert tier.remove([]) == RemovalResult()
    tier.touch([])


@pytest.mark.parametrize("data", [b"", b"\0" * 1000])
def test_bytes_are_opaque(make_tier: MakeTier, data: bytes) -> None:
    tier = make_tier()
    entry = TierEntry(IDS[0], "somebody", data)
    assert tier.store([entry]).count == 1
    assert tier.load(IDS[:1]) == [entry]


def test_what_is_there_is_kept_and_counts_as_stored(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, 0)
    outcome = tier.store([TierEntry(IDS[0], "other", b"other bytes")])
    assert (outcome.count, outcome.evicted) == (1, [])
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert tier.stats().entries == 1


def test_an_exact_block_replaces_one_that_is_not_and_never_the_other_way(make_tier: MakeTier) -> None:
    tier, (rounded,) = make_tier(), entries([inexact(BLOCKS[0])])
    assert tier.store([rounded]).count == 1
    assert (tier.query(IDS[:1]), tier.query(IDS[:1], exact=True)) == (1, 0)
    put(tier, 0)
    assert tier.query(IDS[:1], exact=True) == 1
    assert tier.store([rounded]).count == 1
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert (tier.stats().entries, tier.stats().evictions) == (1, 0)
    assert sum(tier.stats().bytes_by_owner.values()) == tier.stats().bytes


def test_the_limit_holds_and_what_went_is_told(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    put(tier, 0, 1, 2)
    assert tier.store([ENTRIES[3]]).evicted == [IDS[0]]
    assert has(tier) == [1, 2, 3]
    stats = tier.stats()
    assert (stats.entries, stats.evictions) == (3, 1)
    assert stats.bytes <= stats.max_bytes


def test_the_limit_holds_to_the_byte(make_tier: MakeTier) -> None:
    tier = make_tier(2)
    put(tier, 0, 1)
    assert tier.stats().bytes == tier.stats().max_bytes
    tier = make_tier(1.999)
    put(tier, 0, 1)
    assert has(tier) == [1]


def test_a_block_above_the_limit_is_skipped_and_evicts_nothing(make_tier: MakeTier) -> None:
    tier = make_tier(2)
    put(tier, 0, 1)
    outcome = tier.store([TierEntry(IDS[2], "", b"x" * 2000)])
    assert (outcome.count, outcome.evicted) == (0, [])
    assert has(tier) == [0, 1]
    assert tier.stats().skipped == {"too large": 1}


def test_a_load_makes_recent(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    put(tier, 0, 1, 2)
    tier.load([IDS[0]])
    put(tier, 3)
    assert has(tier) == [0, 2, 3]


def test_a_touch_makes_recent(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    put(tier, 0, 1, 2)
    tier.touch([IDS[0], IDS[20]])
    put(tier, 3)
    assert has(tier) == [0, 2, 3]


def test_a_query_does_not_make_recent(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    put(tier, 0, 1, 2)
    assert tier.query(IDS[:3]) == 3
    put(tier, 3)
    assert has(tier) == [1, 2, 3]


@pytest.mark.parametrize("verb", ["load", "touch", "store"])
def test_of_a_batch_the_last_block_goes_first(make_tier: MakeTier, verb: str) -> None:
    tier = make_tier(4)
    if verb == "store":
        tier.store(ENTRIES[:4])
    else:
        put(tier, 0, 1, 2, 3)
        getattr(tier, verb)(IDS[:4])
    put(tier, 4, 5)
    assert has(tier) == [0, 1, 4, 5]


def test_the_order_is_the_policy_s(make_tier: MakeTier) -> None:
    tier = make_tier(3, FIFO)
    put(tier, 0, 1, 2)
    tier.load([IDS[0]])
    put(tier, 3)
    assert has(tier) == [1, 2, 3]


def test_remove_tells_how_many_were_there(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, 0, 1, 2)
    assert tier.remove([IDS[0], IDS[2], IDS[9]]) == RemovalResult(2)
    assert has(tier) == [1]
    assert tier.load(IDS[:2]) == [None, ENTRIES[1]]
    assert tier.stats().evictions == 0


def test_what_was_removed_can_be_stored_again(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    for _ in range(3):
        put(tier, 0)
        assert tier.remove(IDS[:1]) == RemovalResult(1)
    put(tier, 0, 1, 2)
    assert tier.load(IDS[:3]) == ENTRIES[:3]


def test_clear_drops_all(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, 0, 1, 2)
    assert tier.clear() == RemovalResult(3)
    assert has(tier) == []
    assert (tier.stats().entries, tier.stats().bytes, tier.stats().bytes_by_owner) == (0, 0, {})
    put(tier, 1)
    assert has(tier) == [1]


def test_bytes_are_counted_by_owner(make_tier: MakeTier) -> None:
    tier = make_tier()
    tier.store([*entries(BLOCKS[:2], owner="one"), *entries(BLOCKS[2:5], owner="Ä / two")])
    assert [entry and entry.owner for entry in tier.load(IDS[1:3])] == ["one", "Ä / two"]
    stats = tier.stats()
    size = stats.bytes // 5
    assert stats.bytes_by_owner == {"one": 2 * size, "Ä / two": 3 * size}
    tier.remove(IDS[:2])
    assert tier.stats().bytes_by_owner == {"Ä / two": 3 * size}


def test_many_threads(make_tier: MakeTier) -> None:
    tier = make_tier(8)

    def work(turn: int) -> None:
        for step in range(60):
            index = (turn * 7 + step) % 12
            tier.store([ENTRIES[index]])
            found = tier.load(IDS[index : index + 2])
            assert all(entry is None or entry == ENTRIES[index + at] for at, entry in enumerate(found))
            assert tier.stats().bytes <= tier.stats().max_bytes
            if step % 10 == 9:
                tier.remove([IDS[index]])

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(work, turn) for turn in range(6)]:
            done.result(DEADLINE)
    stats = tier.stats()
    assert stats.entries == len(has(tier)) <= 8
    assert sum(stats.bytes_by_owner.values()) == stats.bytes
