"""Floors and quotas in a folder that an earlier process left, whatever it kept to."""

from collections.abc import Mapping
from pathlib import Path

from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.tiers.disk.tier import DiskTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, records

SIZE = len(entries(records(1))[0].data)


def opened(folder: Path, blocks: int, shares: Mapping[str, Share]) -> DiskTier:
    return DiskTier.open(folder, blocks * SIZE, namespace=NAMESPACE, policy=lambda: FairShares(LRU, shares, Share()))


def store(tier: DiskTier, count: int, *, seed: int, owner: str) -> list[bytes]:
    """A chain of so many blocks for an owner, one at a time, as they are computed."""
    blocks = records(count, seed=seed)
    for entry in entries(blocks, owner=owner):
        tier.store([entry])
    return block_hashes(blocks)


def test_floors_and_quotas_hold_for_what_an_earlier_process_left(tmp_path: Path) -> None:
    before = opened(tmp_path, 20, {})
    quiet = store(before, 4, seed=1, owner="quiet")
    store(before, 12, seed=2, owner="flood")
    before.close()
    after = opened(tmp_path, 12, {"quiet": Share(4 * SIZE), "flood": Share(0, 6 * SIZE)})
    assert after.stats().bytes_by_owner == {"quiet": 4 * SIZE, "flood": 6 * SIZE}
    store(after, 9, seed=3, owner="other")
    assert after.lookup(quiet) == 4
    after.close()


def test_a_smaller_folder_takes_from_whoever_is_furthest_above_its_floor(tmp_path: Path) -> None:
    before = opened(tmp_path, 20, {})
    quiet = store(before, 6, seed=1, owner="quiet")
    store(before, 10, seed=2, owner="flood")
    before.close()
    after = opened(tmp_path, 8, {"quiet": Share(6 * SIZE)})
    assert after.stats().bytes_by_owner == {"quiet": 6 * SIZE, "flood": 2 * SIZE}
    assert after.lookup(quiet) == 6
    after.close()
