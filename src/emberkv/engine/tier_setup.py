"""The tiers below the pool: each owner's share of them, the order in which they evict blocks, and opening them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from emberkv.core.hashing import BlockHash
from emberkv.core.policies.eviction import make_policy
from emberkv.core.policies.eviction_policy import EvictionPolicy
from emberkv.core.policies.fair_shares import FairShares, Share, check_floors
from emberkv.core.policies.retention import Retaining, RetentionBudget
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory
from emberkv.tiers.kinds import POOL, TierSpec
from emberkv.tiers.manager import TierManager
from emberkv.tiers.worker import EvictionHook

QUEUE_BYTES = 256 * 2**20
"""Of the blocks that wait to be stored in one tier."""


@dataclass(frozen=True, slots=True)
class TierConfig:
    """tiers: fastest first. shares: by the tier's name (`POOL` for the pool) and owner; a tier that is not in it is
    shared by all owners without limits. retain_share: what part of the pool may be retained on request, 0 to 1.
    """

    tiers: tuple[TierSpec, ...] = ()
    shares: Mapping[str, Mapping[str, Share]] = field(default_factory=dict)
    retain_share: float = 0.0

    def pool_policy(self, eviction: str, pool_bytes: int) -> EvictionPolicy[BlockHash]:
        """eviction: a policy's name. Raises ConfigError for an unknown one, and for floors above the pool's size."""
        most = self.retain_share * pool_bytes
        shared = RetentionBudget(most)

        def inner() -> EvictionPolicy[BlockHash]:
            ordering: EvictionPolicy[BlockHash] = make_policy(eviction)
            return Retaining(ordering, max_bytes=most, shared=shared) if self.retain_share else ordering

        return self._shared(POOL, inner, pool_bytes)()

    def tier_policy(self, tier: TierSpec, eviction: str) -> PolicyFactory:
        """Raises ConfigError for floors above the tier's size."""
        return self._shared(tier.name, lambda: make_policy(eviction), tier.capacity)

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

    block_bytes: of a block of the model, which a tier must have room for. Raises ConfigError for a size that cannot
    work here, and CacheFolderError.
    """
    for tier in config.tiers:
        if tier.capacity < block_bytes:
            raise ConfigError(
                f"{tier.option} is {tier.capacity:,} bytes; a block of this model takes {block_bytes:,}, so give more"
            )
    if not config.tiers:
        return None
    tiers = [tier.open(namespace, config.tier_policy(tier, eviction)) for tier in config.tiers]
    return TierManager(tiers, namespace=namespace, queue_bytes=QUEUE_BYTES, on_evicted=on_evicted)
