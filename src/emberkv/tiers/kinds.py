"""The kinds of tiers: a tier is described by a `TierSpec`, and a new kind by one entry of `TIER_KINDS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize

from emberkv.errors import ConfigError
from emberkv.tiers.base import PolicyFactory, Tier
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier

POOL = "pool"
"""The name of the KV pool, which is no tier, beside the tiers' names in shares and statistics."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier to open.

    kind: one of `TIER_KINDS`; "ram", "disk". name: in shares, statistics and metrics. capacity: bytes. folder: of a
    kind that stores its blocks in one. shared: other processes find what this one stores, and so does the next start.

    >>> TierSpec("ram", capacity=2**30)
    TierSpec(kind='ram', capacity=1073741824, folder=None)
    >>> TierSpec("ram", capacity=2**30).name, TierSpec("ram", capacity=2**30).shared
    ('ram', False)
    """

    kind: str
    capacity: int
    folder: Path | None = None

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
        where = f"in {self.folder}" if self.folder is not None else "of memory"
        return f"{ByteSize(self.capacity).human_readable()} {where}"

    def open(self, namespace: bytes, policy: PolicyFactory) -> Tier:
        """Raises ConfigError for a size that cannot work, and CacheFolderError."""
        return TIER_KINDS[self.kind].open(self, namespace, policy)


@dataclass(frozen=True, slots=True)
class TierKind:
    """See `TierSpec`, whose properties it gives."""

    option: str
    shared: bool
    open: Callable[[TierSpec, bytes, PolicyFactory], Tier]


def _open_ram(spec: TierSpec, namespace: bytes, policy: PolicyFactory) -> Tier:
    return MemoryTier(spec.capacity, policy=policy, name=spec.name)


def _open_disk(spec: TierSpec, namespace: bytes, policy: PolicyFactory) -> Tier:
    if spec.folder is None:
        raise ConfigError("a tier of kind 'disk' has no folder; give the folder in which it stores its blocks")
    return DiskTier.open(spec.folder, spec.capacity, namespace=namespace, policy=policy, name=spec.name)


TIER_KINDS = {
    "ram": TierKind("--ram-tier", shared=False, open=_open_ram),
    "disk": TierKind("--cache-disk", shared=True, open=_open_disk),
}
"""By name, the fastest first."""

SHARED_OUT = (POOL, *TIER_KINDS)
"""The names of what tenants have shares of."""


def configured_tiers(*, ram_bytes: int, folder: Path | None, disk_bytes: int) -> tuple[TierSpec, ...]:
    """The tiers that a server's settings name, fastest first. ram_bytes: 0: no RAM tier; folder: None: no disk tier."""
    ram = [TierSpec("ram", ram_bytes)] if ram_bytes else []
    disk = [TierSpec("disk", disk_bytes, folder)] if folder is not None else []
    return (*ram, *disk)
