"""What every tier does alike. A new tier joins by being added to `TIERS`."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from emberkv.core.eviction import FIFO, LRU
from emberkv.core.fair_shares import FairShares, Share
from emberkv.tiers.base import PolicyFactory, Tier, TierEntry
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, entries, identities, inexact, records

Make = Callable[..., Tier]
"""``make(blocks=10, policy=LRU)``: a tier with room for so many of `ENTRIES`."""

BLOCKS = records(30)
ENTRIES = entries(BLOCKS)
IDS = identities(BLOCKS)


def memory(folder: Path, blocks: float, policy: PolicyFactory) -> Tier:
    return MemoryTier(int(blocks * (len(ENTRIES[0].data) + 64)), policy=policy)


def disk(folder: Path, blocks: float, policy: PolicyFactory) -> Tier:
    return DiskTier.open(folder, int(blocks * len(ENTRIES[0].data)), namespace=NAMESPACE, policy=policy)


TIERS = (memory, disk)


@pytest.fixture(params=TIERS, ids=lambda tier: tier.__name__)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    folders = (tmp_path / str(number) for number in count())
    made: list[Tier] = []

    def get(blocks: float = 10, policy: PolicyFactory = LRU) -> Tier:
        made.append(request.param(next(folders), blocks, policy))
        return made[-1]

    yield get
    for tier in made:
        tier.close()


def has(tier: Tier) -> list[int]:
    """Which of `BLOCKS` are there, without an access."""
    return [index for index, identity in enumerate(IDS) if tier.lookup([identity])]


def put(tier: Tier, *indices: int) -> None:
    for index in indices:
        assert tier.store([ENTRIES[index]]).count == 1


def test_what_is_stored_comes_back(make: Make) -> None:
    tier = make()
    assert tier.store(ENTRIES[:5]).count == 5
    assert tier.load(IDS[:5]) == ENTRIES[:5]
    assert tier.load([IDS[3], IDS[9], IDS[0]]) == [ENTRIES[3], None, ENTRIES[0]]


def test_lookup_counts_the_first_run(make: Make) -> None:
    tier = make()
    put(tier, 0, 1, 3)
    assert [tier.lookup(IDS[start:]) for start in range(5)] == [2, 1, 0, 1, 0]
    assert tier.lookup([]) == 0


def test_empty_batches(make: Make) -> None:
    tier = make()
    assert tier.load([]) == []
    assert tier.store([]).count == 0
    assert tier.remove([]) == 0
    tier.touch([])


@pytest.mark.parametrize("data", [b"", b"\0" * 1000])
def test_bytes_are_opaque(make: Make, data: bytes) -> None:
    tier = make()
    entry = TierEntry(IDS[0], "somebody", data)
    assert tier.store([entry]).count == 1
    assert tier.load(IDS[:1]) == [entry]


def test_what_is_there_is_kept_and_counts_as_stored(make: Make) -> None:
    tier = make()
    put(tier, 0)
    outcome = tier.store([TierEntry(IDS[0], "other", b"other bytes")])
    assert (outcome.count, outcome.evicted) == (1, [])
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert tier.stats().entries == 1


def test_an_exact_block_replaces_one_that_is_not_and_never_the_other_way(make: Make) -> None:
    tier, (rounded,) = make(), entries([inexact(BLOCKS[0])])
    assert tier.store([rounded]).count == 1
    assert (tier.lookup(IDS[:1]), tier.lookup(IDS[:1], exact=True)) == (1, 0)
    put(tier, 0)
    assert tier.lookup(IDS[:1], exact=True) == 1
    assert tier.store([rounded]).count == 1
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert (tier.stats().entries, tier.stats().evictions) == (1, 0)
    assert sum(tier.stats().bytes_by_owner.values()) == tier.stats().bytes


def test_the_limit_holds_and_what_went_is_told(make: Make) -> None:
    tier = make(3)
    put(tier, 0, 1, 2)
    assert tier.store([ENTRIES[3]]).evicted == [IDS[0]]
    assert has(tier) == [1, 2, 3]
    stats = tier.stats()
    assert (stats.entries, stats.evictions) == (3, 1)
    assert stats.bytes <= stats.max_bytes


def test_the_limit_holds_to_the_byte(make: Make) -> None:
    tier = make(2)
    put(tier, 0, 1)
    assert tier.stats().bytes == tier.stats().max_bytes
    tier = make(1.999)
    put(tier, 0, 1)
    assert has(tier) == [1]


def test_a_block_above_the_limit_is_skipped_and_evicts_nothing(make: Make) -> None:
    tier = make(2)
    put(tier, 0, 1)
    outcome = tier.store([TierEntry(IDS[2], "", b"x" * 2000)])
    assert (outcome.count, outcome.evicted) == (0, [])
    assert has(tier) == [0, 1]
    assert tier.stats().skipped == {"too large": 1}


def test_a_load_makes_recent(make: Make) -> None:
    tier = make(3)
    put(tier, 0, 1, 2)
    tier.load([IDS[0]])
    put(tier, 3)
    assert has(tier) == [0, 2, 3]


def test_a_touch_makes_recent(make: Make) -> None:
    tier = make(3)
    put(tier, 0, 1, 2)
    tier.touch([IDS[0], IDS[20]])
    put(tier, 3)
    assert has(tier) == [0, 2, 3]


def test_a_lookup_does_not_make_recent(make: Make) -> None:
    tier = make(3)
    put(tier, 0, 1, 2)
    assert tier.lookup(IDS[:3]) == 3
    put(tier, 3)
    assert has(tier) == [1, 2, 3]


@pytest.mark.parametrize("verb", ["load", "touch", "store"])
def test_of_a_batch_the_last_block_goes_first(make: Make, verb: str) -> None:
    tier = make(4)
    if verb == "store":
        tier.store(ENTRIES[:4])
    else:
        put(tier, 0, 1, 2, 3)
        getattr(tier, verb)(IDS[:4])
    put(tier, 4, 5)
    assert has(tier) == [0, 1, 4, 5]


def test_the_order_is_the_policy_s(make: Make) -> None:
    tier = make(3, FIFO)
    put(tier, 0, 1, 2)
    tier.load([IDS[0]])
    put(tier, 3)
    assert has(tier) == [1, 2, 3]


def test_remove_tells_how_many_were_there(make: Make) -> None:
    tier = make()
    put(tier, 0, 1, 2)
    assert tier.remove([IDS[0], IDS[2], IDS[9]]) == 2
    assert has(tier) == [1]
    assert tier.load(IDS[:2]) == [None, ENTRIES[1]]
    assert tier.stats().evictions == 0


def test_what_was_removed_can_be_stored_again(make: Make) -> None:
    tier = make(3)
    for _ in range(3):
        put(tier, 0)
        assert tier.remove(IDS[:1]) == 1
    put(tier, 0, 1, 2)
    assert tier.load(IDS[:3]) == ENTRIES[:3]


def test_clear_drops_all(make: Make) -> None:
    tier = make()
    put(tier, 0, 1, 2)
    assert tier.clear() == 3
    assert has(tier) == []
    assert (tier.stats().entries, tier.stats().bytes, tier.stats().bytes_by_owner) == (0, 0, {})
    put(tier, 1)
    assert has(tier) == [1]


def test_bytes_are_counted_by_owner(make: Make) -> None:
    tier = make()
    tier.store([*entries(BLOCKS[:2], owner="one"), *entries(BLOCKS[2:5], owner="Ä / two")])
    assert [entry and entry.owner for entry in tier.load(IDS[1:3])] == ["one", "Ä / two"]
    stats = tier.stats()
    size = stats.bytes // 5
    assert stats.bytes_by_owner == {"one": 2 * size, "Ä / two": 3 * size}
    tier.remove(IDS[:2])
    assert tier.stats().bytes_by_owner == {"Ä / two": 3 * size}


def shares(make: Make, **each: Share) -> PolicyFactory:
    return partial(FairShares, LRU, each, Share())


def test_an_owner_above_its_quota_loses_its_own(make: Make) -> None:
    size = len(ENTRIES[0].data) + 64
    tier = make(10, shares(make, small=Share(0, 3 * size)))
    tier.store(entries(BLOCKS[:2], owner="other"))
    evicted = [identity for block in BLOCKS[2:8] for identity in tier.store(entries([block], owner="small")).evicted]
    assert set(has(tier)) >= {0, 1}
    assert tier.stats().bytes_by_owner["small"] <= 3 * size
    assert evicted == IDS[2 : 2 + len(evicted)]
    assert len(evicted) == tier.stats().evictions >= 3


def test_a_flood_does_not_push_others_below_their_floor(make: Make) -> None:
    size = len(ENTRIES[0].data) + 64
    tier = make(6, shares(make, quiet=Share(4 * size)))
    tier.store(entries(BLOCKS[:4], owner="quiet"))
    for block in BLOCKS[4:]:
        tier.store(entries([block], owner="flood"))
    assert has(tier)[:4] == [0, 1, 2, 3]
    assert tier.stats().bytes <= tier.stats().max_bytes


def test_a_block_for_which_only_floors_could_give_way_is_skipped(make: Make) -> None:
    size = len(ENTRIES[0].data) + 64
    tier = make(4, shares(make, quiet=Share(4 * size)))
    tier.store(entries(BLOCKS[:4], owner="quiet"))
    outcome = tier.store(entries(BLOCKS[4:5], owner="flood"))
    assert (outcome.count, outcome.evicted) == (0, [])
    assert has(tier) == [0, 1, 2, 3]
    assert tier.stats().skipped == {"no room": 1}
    assert set(tier.stats().bytes_by_owner) == {"quiet"}


def test_many_threads(make: Make) -> None:
    tier = make(8)

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
            done.result(60)
    stats = tier.stats()
    assert stats.entries == len(has(tier)) <= 8
    assert sum(stats.bytes_by_owner.values()) == stats.bytes
