"""The tiers below the pool as configured: their kinds, each owner's share of them, and opening them.

A tier is described by a `TierSpec`, and a new kind by one entry of `TIER_KINDS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ByteSize

from emberkv.core.hashing import BlockHash
from emberkv.core.policies.eviction import EvictionPolicy, make_policy
from emberkv.core.policies.fair_shares import FairShares, Share, check_floors
from emberkv.core.policies.retention import Retaining, RetentionBudget
from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Tier
from emberkv.tiers.codec import MOST_BESIDE
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.remote.mooncake import SCHEME, MooncakeTier
from emberkv.tiers.remote.server import ServerAddress
from emberkv.tiers.remote.tier import DEFAULT_TTL_SECONDS, RemoteTier
from emberkv.tiers.shm.tier import FOLDER, ShmTier

POOL = "pool"
"""The name of the KV pool, which is no tier, beside the tiers' names in shares and statistics."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier to open.

    kind: one of `TIER_KINDS`. name: in shares, statistics and metrics. capacity: bytes. folder: of a kind that stores
    its blocks in one. server: of a kind that stores them there, and ttl_seconds: how long one that is not used is kept.
    shared: other processes find what this one stores, and so does the next start.

    >>> TierSpec("ram", capacity=2**30).option
    '--ram-tier'
    >>> TierSpec("ram", capacity=2**30).name, TierSpec("ram", capacity=2**30).shared
    ('ram', False)
    """

    kind: str
    capacity: int
    folder: Path | None = None
    server: ServerAddress | None = None
    ttl_seconds: float = DEFAULT_TTL_SECONDS

    def __post_init__(self) -> None:
        if self.kind not in TIER_KINDS:
            raise ConfigError(f"a tier of kind {self.kind!r} is unknown; use one of {', '.join(TIER_KINDS)}")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def shared(self) -> bool:
        return TIER_KINDS[self.kind].shared

    @property
    def option(self) -> str:
        """The option of `emberkv serve` that sets the capacity."""
        return TIER_KINDS[self.kind].option

    def __str__(self) -> str:
        place = self.folder or self.server
        where = "of memory" if place is None else f"in {place}"
        return f"{ByteSize(self.capacity).human_readable()} {where}"

    def open(
        self,
        namespace: bytes,
        policy: PolicyFactory,
        shares: Mapping[str, Share] | None = None,
        *,
        block_bytes: int = 0,
    ) -> Tier:
        """policy: the order of eviction, with the owners' shares in it. shares: the same ones, for a kind that has an
        order of its own. block_bytes: of a block of the model, for a kind that has a buffer for blocks.

        Raises ConfigError for a size that cannot work, and CacheFolderError.
        """
        return TIER_KINDS[self.kind].open(self, namespace, policy, shares or {}, block_bytes)


@dataclass(frozen=True, slots=True)
class TierKind:
    """See `TierSpec`, whose properties it gives."""

    option: str
    shared: bool
    open: Callable[[TierSpec, bytes, PolicyFactory, Mapping[str, Share], int], Tier]


def _open_ram(
    spec: TierSpec, namespace: bytes, policy: PolicyFactory, shares: Mapping[str, Share], block_bytes: int
) -> Tier:
    return MemoryTier(spec.capacity, policy=policy, name=spec.name)


def _open_disk(
    spec: TierSpec, namespace: bytes, policy: PolicyFactory, shares: Mapping[str, Share], block_bytes: int
) -> Tier:
    if spec.folder is None:
        raise ConfigError("a tier of kind 'disk' has no folder; give the folder in which it stores its blocks")
    return DiskTier.open(spec.folder, spec.capacity, namespace=namespace, policy=policy, name=spec.name)


def _open_remote(
    spec: TierSpec, namespace: bytes, policy: PolicyFactory, shares: Mapping[str, Share], block_bytes: int
) -> Tier:
    if spec.server is None:
        raise ConfigError("a tier of kind 'remote' has no server; give the address of the one that stores its blocks")
    if spec.server.url.startswith(f"{SCHEME}://"):
        if shares:
            raise ConfigError(
                f"tenants have floors or quotas under {spec.name!r}, which a Mooncake store does not keep; leave them "
                "out, or use a Redis or Valkey server as --remote-tier"
            )
        return MooncakeTier(
            spec.server, spec.capacity, namespace=namespace, name=spec.name, block_bytes=block_bytes
        ).connect()
    return RemoteTier(
        spec.server, spec.capacity, namespace=namespace, ttl_seconds=spec.ttl_seconds, shares=shares, name=spec.name
    ).connect()


def _open_shm(
    spec: TierSpec, namespace: bytes, policy: PolicyFactory, shares: Mapping[str, Share], block_bytes: int
) -> Tier:
    return ShmTier.open(spec.capacity, namespace=namespace, policy=policy, name=spec.name, folder=spec.folder or FOLDER)


TIER_KINDS = {
    "ram": TierKind("--ram-tier", shared=False, open=_open_ram),
    "shm": TierKind("--shm-tier", shared=True, open=_open_shm),
    "disk": TierKind("--cache-disk", shared=True, open=_open_disk),
    "remote": TierKind("--remote-tier-bytes", shared=True, open=_open_remote),
}
"""By name, the fastest first."""

SHARED_OUT = (POOL, *TIER_KINDS)
"""The names of what tenants have shares of."""


def configured_tiers(
    *,
    ram_bytes: int,
    folder: Path | None,
    disk_bytes: int,
    shm_bytes: int = 0,
    server: ServerAddress | None = None,
    server_bytes: int = 0,
    ttl_seconds: float = DEFAULT_TTL_SECONDS,
) -> tuple[TierSpec, ...]:
    """The tiers that a server's settings name, fastest first.

    ram_bytes, shm_bytes: 0: no such tier. folder: None: no disk tier. server: None: no remote tier.
    """
    ram = [TierSpec("ram", ram_bytes)] if ram_bytes else []
    disk = [TierSpec("disk", disk_bytes, folder)] if folder is not None else []
    shm = [TierSpec("shm", shm_bytes)] if shm_bytes else []
    remote = [TierSpec("remote", server_bytes, server=server, ttl_seconds=ttl_seconds)] if server is not None else []
    return (*ram, *shm, *disk, *remote)


QUEUE_BYTES = 256 * 2**20
"""The size of a tier's write queue, unless `QUEUED_BLOCKS` blocks are larger."""

QUEUED_BLOCKS = 4
"""The number of blocks that a tier's write queue holds whatever their size: one of a hybrid model may have 400 MiB."""


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
    queue_bytes: int = QUEUE_BYTES,
) -> TierManager | None:
    """The tiers that the configuration names, or None.

    block_bytes: of a block of the model; no tier may be smaller than one. queue_bytes: see `QUEUE_BYTES`. Raises
    ConfigError for a size that cannot work here, and CacheFolderError.
    """
    for tier in config.tiers:
        if tier.capacity < block_bytes:
            raise ConfigError(
                f"{tier.option} is {tier.capacity:,} bytes; a block of this model takes {block_bytes:,}, so give more"
            )
    if not config.tiers:
        return None
    tiers = [
        tier.open(
            namespace,
            config.tier_policy(tier, eviction),
            config.shares.get(tier.name, {}),
            block_bytes=block_bytes,
        )
        for tier in config.tiers
    ]
    queue_bytes = max(queue_bytes, QUEUED_BLOCKS * (block_bytes + MOST_BESIDE))
    return TierManager(tiers, namespace=namespace, queue_bytes=queue_bytes)
