"""Which tiers lie below the pool, who has which share of each, and in what order they give up blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from emberkv.core.hashing import Identity
from emberkv.core.policies.eviction import make_policy
from emberkv.core.policies.eviction_policy import EvictionPolicy
from emberkv.core.policies.fair_shares import FairShares, Share, check_floors
from emberkv.core.policies.retention import Retaining, RetentionBudget
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Tier
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.worker import EvictionHook

QUEUE_BYTES = 256 * 2**20
POOL, RAM, DISK = "pool", "ram", "disk"


@dataclass(frozen=True, slots=True)
class TierConfig:
    """ram_bytes: of the RAM tier; 0: none. folder and disk_bytes: of the disk tier; None: none.

    shares: by tier (`POOL`, `RAM`, `DISK`) and owner; a tier that is not in it is everybody's. retain_share: what part
    of the pool may be retained on request, 0 to 1.
    """

    ram_bytes: int = 0
    folder: Path | None = None
    disk_bytes: int = 50 * 2**30
    shares: Mapping[str, Mapping[str, Share]] = field(default_factory=dict)
    retain_share: float = 0.0

    def pool_policy(self, eviction: str, pool_bytes: int) -> EvictionPolicy[Identity]:
        """eviction: a policy's name. Raises ConfigError for an unknown one, and for floors above the pool's size."""
        most = self.retain_share * pool_bytes
        shared = RetentionBudget(most)

        def inner() -> EvictionPolicy[Identity]:
            ordering: EvictionPolicy[Identity] = make_policy(eviction)
            return Retaining(ordering, max_bytes=most, shared=shared) if self.retain_share else ordering

        return self._shared(POOL, inner, pool_bytes)()

    def tier_policy(self, tier: str, eviction: str) -> PolicyFactory:
        """Raises ConfigError for floors above the tier's size."""
        size = self.ram_bytes if tier == RAM else self.disk_bytes
        return self._shared(tier, lambda: make_policy(eviction), size)

    def _shared(self, tier: str, make_inner: PolicyFactory, size: int) -> PolicyFactory:
        shares = self.shares.get(tier)
        if not shares:
            return make_inner
        check_floors(shares, size, f"the {tier} tier" if tier != POOL else "the KV pool")
        return lambda: FairShares(make_inner, shares, Share())


def open_tiers(
    config: TierConfig,
    eviction: str,
    namespace: bytes,
    *,
    block_bytes: int,
    on_evicted: EvictionHook = lambda _tier, _hashes: None,
) -> TierManager | None:
    """The tiers that the configuration names, or None.

    block_bytes: of a block of the model, which a tier must have room for. Raises
    ConfigError for a size that cannot work here, and CacheFolderError.
    """
    tiers: list[Tier] = []
    disk_bytes = config.disk_bytes if config.folder is not None else 0
    for option, size in (("--ram-tier", config.ram_bytes), ("--cache-disk", disk_bytes)):
        if 0 < size < block_bytes:
            raise ConfigError(f"{option} is {size:,} bytes; a block of this model takes {block_bytes:,}, so give more")
    if config.ram_bytes:
        tiers.append(MemoryTier(config.ram_bytes, policy=config.tier_policy(RAM, eviction), name=RAM))
    if config.folder is not None:
        policy = config.tier_policy(DISK, eviction)
        tiers.append(DiskTier.open(config.folder, config.disk_bytes, namespace=namespace, policy=policy, name=DISK))
    return TierManager(tiers, namespace=namespace, queue_bytes=QUEUE_BYTES, on_evicted=on_evicted) if tiers else None
