"""Floors and quotas of owners, which every tier keeps alike."""

from emberkv.core.policies.fair_shares import Share
from tests.tiers.build import entries
from tests.tiers.contract import BLOCKS, IDS, MakeTier, block_bytes, has


def test_an_owner_above_its_quota_loses_its_own(make_tier: MakeTier) -> None:
    size = block_bytes(make_tier)
    tier = make_tier(10, shares={"small": Share(0, 3 * size)})
    tier.store(entries(BLOCKS[:2], owner="other"))
    evicted = [
        block_hash for block in BLOCKS[2:8] for block_hash in tier.store(entries([block], owner="small")).evicted
    ]
    assert set(has(tier)) >= {0, 1}
    assert tier.stats().bytes_by_owner["small"] <= 3 * size
    assert evicted == IDS[2 : 2 + len(evicted)]
    assert len(evicted) == tier.stats().evictions >= 3


def test_a_flood_does_not_push_others_below_their_floor(make_tier: MakeTier) -> None:
    size = block_bytes(make_tier)
    tier = make_tier(6, shares={"quiet": Share(4 * size)})
    tier.store(entries(BLOCKS[:4], owner="quiet"))
    for block in BLOCKS[4:]:
        tier.store(entries([block], owner="flood"))
    assert has(tier)[:4] == [0, 1, 2, 3]
    assert tier.stats().bytes <= tier.stats().max_bytes


def test_a_block_for_which_only_floors_could_give_way_is_skipped(make_tier: MakeTier) -> None:
    size = block_bytes(make_tier)
    tier = make_tier(4, shares={"quiet": Share(4 * size)})
    tier.store(entries(BLOCKS[:4], owner="quiet"))
    outcome = tier.store(entries(BLOCKS[4:5], owner="flood"))
    assert (outcome.count, outcome.evicted) == (0, [])
    assert has(tier) == [0, 1, 2, 3]
    assert tier.stats().skipped == {"no room": 1}
    assert set(tier.stats().bytes_by_owner) == {"quiet"}
