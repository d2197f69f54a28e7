"""Shares of the RAM and disk tiers: a flood leaves a floor alone, a quota binds, also in a folder found again."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from emberkv.core.eviction import LRU
from emberkv.core.fair_shares import FairShares, Share
from emberkv.tiers.base import Tier
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, entries, identities, records

MemoryOrDisk = Callable[[int, Mapping[str, Share]], Tier]
HEX_KEY = 64
SIZE = len(entries(records(1))[0].data)
"""Bytes of a block; the RAM tier counts its key too."""


@pytest.fixture(params=["ram", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryOrDisk:
    """A tier of so many blocks, with shares in blocks."""

    def make_ram(count: int, shares: Mapping[str, Share]) -> Tier:
        scaled = in_bytes(shares, SIZE + HEX_KEY)
        return MemoryTier(count * (SIZE + HEX_KEY), policy=lambda: FairShares(LRU, scaled, Share()))

    def make_disk(count: int, shares: Mapping[str, Share]) -> Tier:
        return open_disk(tmp_path, count, shares)

    return make_ram if request.param == "ram" else make_disk


def open_disk(folder: Path, count: int, shares: Mapping[str, Share]) -> DiskTier:
    scaled = in_bytes(shares, SIZE)
    return DiskTier.open(folder, count * SIZE, namespace=NAMESPACE, policy=lambda: FairShares(LRU, scaled, Share()))


def in_bytes(shares: Mapping[str, Share], size: int) -> dict[str, Share]:
    return {
        owner: Share(share.floor_bytes * size, None if share.quota_bytes is None else share.quota_bytes * size)
        for owner, share in shares.items()
    }


def store(tier: Tier, count: int, *, seed: int, owner: str) -> list[bytes]:
    """A chain of so many blocks for an owner, one at a time, as they are computed."""
    blocks = records(count, seed=seed)
    for entry in entries(blocks, owner=owner):
        tier.store([entry])
    return identities(blocks)


def test_a_flood_leaves_a_floor_alone(make: MemoryOrDisk) -> None:
    tier = make(12, {"quiet": Share(floor_bytes=5)})
    quiet = store(tier, 5, seed=1, owner="quiet")
    for seed in range(2, 30):
        store(tier, 7, seed=seed, owner="flood")
    assert tier.lookup(quiet) == 5
    assert tier.stats().bytes <= tier.stats().max_bytes
    assert len(tier.stats().bytes_by_owner) == 2


def test_above_its_floor_an_owner_loses_as_others_do(make: MemoryOrDisk) -> None:
    tier = make(12, {"quiet": Share(floor_bytes=5)})
    store(tier, 12, seed=1, owner="quiet")
    store(tier, 20, seed=2, owner="flood")
    blocks = {owner: size * 12 // tier.stats().bytes for owner, size in tier.stats().bytes_by_owner.items()}
    assert blocks == {"quiet": 8, "flood": 4}  # 3 and 4 above their floors: from here on the flood takes from itself


def test_what_is_guaranteed_to_others_is_not_given_away(make: MemoryOrDisk) -> None:
    tier = make(5, {"quiet": Share(floor_bytes=5)})
    quiet = store(tier, 5, seed=1, owner="quiet")
    flood = store(tier, 3, seed=2, owner="flood")
    assert (tier.lookup(quiet), tier.lookup(flood)) == (5, 0)
    assert tier.stats().skipped == {"no room": 3}


def test_a_quota_binds_though_there_is_room(make: MemoryOrDisk) -> None:
    tier = make(20, {"small": Share(quota_bytes=3)})
    store(tier, 8, seed=1, owner="small")
    assert tier.stats().entries == 3
    store(tier, 8, seed=2, owner="other")
    assert tier.stats().entries == 11


def test_floors_and_quotas_hold_for_what_an_earlier_process_left(tmp_path: Path) -> None:
    before = open_disk(tmp_path, 20, {})
    quiet = store(before, 4, seed=1, owner="quiet")
    store(before, 12, seed=2, owner="flood")
    before.close()
    after = open_disk(tmp_path, 12, {"quiet": Share(floor_bytes=4), "flood": Share(quota_bytes=6)})
    assert after.stats().bytes_by_owner == {"quiet": 4 * SIZE, "flood": 6 * SIZE}
    store(after, 9, seed=3, owner="other")
    assert after.lookup(quiet) == 4
    after.close()
