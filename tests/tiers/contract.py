"""The tiers that keep one contract. A new tier joins by being added to `TIERS`."""

from collections.abc import Callable
from pathlib import Path

from emberkv.tiers.base import PolicyFactory, Tier
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, records

MakeTier = Callable[..., Tier]
"""``make_tier(blocks=10, policy=LRU)``: a tier with room for so many of `ENTRIES`."""

BLOCKS = records(30)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)


def memory(folder: Path, blocks: float, policy: PolicyFactory) -> Tier:
    return MemoryTier(int(blocks * (len(ENTRIES[0].data) + 64)), policy=policy)


def disk(folder: Path, blocks: float, policy: PolicyFactory) -> Tier:
    return DiskTier.open(folder, int(blocks * len(ENTRIES[0].data)), namespace=NAMESPACE, policy=policy)


TIERS = (memory, disk)


def has(tier: Tier) -> list[int]:
    """Which of `BLOCKS` are there, without an access."""
    return [index for index, block_hash in enumerate(IDS) if tier.lookup([block_hash])]


def put(tier: Tier, *indices: int) -> None:
    for index in indices:
        assert tier.store([ENTRIES[index]]).count == 1
