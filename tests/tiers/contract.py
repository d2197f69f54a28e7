"""The tiers that keep one contract. A new tier joins by being added to `TIERS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.tiers.base import PolicyFactory, Tier
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.remote.tier import ENTRY_BYTES, RemoteTier
from emberkv.tiers.shm.tier import ShmTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, records
from tests.tiers.redis_process import RedisProcess

MakeTier = Callable[..., Tier]
"""``make_tier(blocks=10, policy=LRU, shares=None)``: a tier with room for so many of `ENTRIES`."""

BLOCKS = records(30)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
RECORD_BYTES = len(ENTRIES[0].data)


@dataclass(frozen=True)
class Place:
    """Where a tier of its own can be made. server: for the remote tier alone."""

    folder: Path
    server: RedisProcess | None


def ordered(policy: PolicyFactory, shares: Mapping[str, Share]) -> PolicyFactory:
    return partial(FairShares, policy, shares, Share()) if shares else policy


def memory(place: Place, blocks: float, policy: PolicyFactory, shares: Mapping[str, Share]) -> Tier:
    return MemoryTier(int(blocks * (RECORD_BYTES + 64)), policy=ordered(policy, shares))


def disk(place: Place, blocks: float, policy: PolicyFactory, shares: Mapping[str, Share]) -> Tier:
    size = int(blocks * RECORD_BYTES)
    return DiskTier.open(place.folder, size, namespace=NAMESPACE, policy=ordered(policy, shares))


def remote(place: Place, blocks: float, policy: PolicyFactory, shares: Mapping[str, Share]) -> Tier:
    assert place.server is not None
    size, prefix = int(blocks * (RECORD_BYTES + ENTRY_BYTES)), f"{place.folder}:".encode()
    return RemoteTier(place.server.address, size, namespace=NAMESPACE, shares=shares, prefix=prefix).connect()


def shm(place: Place, blocks: float, policy: PolicyFactory, shares: Mapping[str, Share]) -> Tier:
    place.folder.mkdir()
    size = int(blocks * (-(-RECORD_BYTES // 64) * 64))
    return ShmTier.open(size, namespace=NAMESPACE, policy=ordered(policy, shares), folder=place.folder)


TIERS = (memory, shm, disk, remote)


def has(tier: Tier) -> list[int]:
    """Which of `BLOCKS` are there, without an access."""
    return [index for index, block_hash in enumerate(IDS) if tier.query([block_hash])]


def put(tier: Tier, *indices: int) -> None:
    for index in indices:
        assert tier.store([ENTRIES[index]]).count == 1


def block_bytes(make_tier: MakeTier) -> int:
    """What one of `ENTRIES` takes in such a tier."""
    tier = make_tier()
    put(tier, 0)
    return tier.stats().bytes
