"""The interface of a tier: a store of opaque bytes by block hash, called with batches only.

A tier whose index is in memory, such as RAM and disk, answers `lookup` at once. One that must do I/O for an answer,
such as a server in the network, says PENDING in `status`, and its worker calls `query` on a thread of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from emberkv.core.loading import LookupStatus
from emberkv.core.policies.eviction import EvictionPolicy
from emberkv.tiers.partial import PartialPlace
from emberkv.tiers.stats import TierStats

PolicyFactory = Callable[[], EvictionPolicy[Any]]
"""Makes the order in which a tier gives up its blocks; called again when the tier is cleared."""


KEY_BYTES = 64
"""Counted for each entry in memory beside its own bytes."""


@dataclass(frozen=True, slots=True)
class TierEntry:
    """A block as a tier keeps it.

    owner: whose share of the tier it takes; "" for the only one. data: the encoded `BlockRecord`, see `tiers.codec`.
    exact: see `BlockRecord`. partial: where it lies, if it is a partial block.
    """

    block_hash: bytes
    owner: str
    data: bytes
    exact: bool = True
    partial: PartialPlace | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, `KEY_BYTES` included."""
        return KEY_BYTES + len(self.data)


@dataclass(frozen=True, slots=True)
class StoreResult:
    """The result of a store. count: of the entries given, those that the tier has now. evicted: the full blocks that
    had to go.
    """

    count: int = 0
    evicted: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RemovalResult:
    """The result of a removal. count: full blocks that are gone. kept: blocks whose bytes are still stored, though
    this process does not serve them any more. reason: why they are; "" where none are kept.
    """

    count: int = 0
    kept: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SharedStore:
    """A tier whose blocks other processes find, too.

    store_id: see `Tier`. is_listed: its blocks are known without I/O, so that a process reports them when it starts.
    is_scanned: `Tier.scan` reads them.
    """

    store_id: bytes
    is_listed: bool
    is_scanned: bool = False


class Tier(Protocol):
    """All methods may be called from any thread, `store` and `refresh` from one at a time. Failures of the storage
    itself are counted in ``stats``, never raised. A tier that answers `lookup` from memory inherits `lookup_seconds`,
    `status`, `query` and `scan` from here, one that no other process changes inherits `removals_seen`, and one whose
    blocks go only by removal or eviction `was_emptied` and `lost_blocks`.

    Recency: what is stored, loaded or touched becomes the most recent, the first of a batch most of all, because a
    block is of no use without those before it.

    keeps_partial: whether it stores partial blocks; other tiers inherit `partial_counts`, `partial_place` and
    `partial_owner` and are given none. A partial block is stored, loaded, touched and evicted like any other, by its
    own hash.

    is_scanned: whether `scan` reads the blocks of a tier whose `block_hashes` are empty.

    store_id: equal in the tiers of all processes that find the same blocks, see `tiers.store_id`; None where no other
    process finds this one's, and while it is not known. It may change.
    """

    name: str
    store_id: bytes | None = None
    keeps_partial: bool = False
    is_scanned: bool = False

    @property
    def lookup_seconds(self) -> float | None:
        """How long an admission waits for `query`, after which the tier counts as a miss; None: it is never called."""
        return None

    @property
    def refresh_seconds(self) -> float | None:
        """How often `refresh` is to be called; None: never."""

    @property
    def removals_seen(self) -> int:
        """The last removal, by any process, that this process knows of: for `store`. No I/O. 0 where only this process
        changes the tier.
        """
        return 0

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """The length of the run of blocks, from the first on, that are known to be here. No I/O.

        exact: count only exact blocks.
        """

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        """Whether a block is here, without I/O; PENDING where only `query` can tell."""
        return LookupStatus.HIT if self.lookup((block_hash,), exact=exact) else LookupStatus.MISS

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """As `lookup`, with I/O where that is needed."""
        return self.lookup(block_hashes, exact=exact)

    def block_hashes(self) -> list[bytes]:
        """The hashes of the full blocks that `lookup` finds; empty where that would take I/O."""
        return []

    def partial_counts(self, parent: bytes) -> list[int]:
        """The numbers of tokens that partial blocks with this parent have, as far as they may be here; the one that
        came last is the last. No I/O.
        """
        return []

    def partial_place(self, block_hash: bytes) -> PartialPlace | None:
        """Where a partial block that is here lies; None for any other hash. No I/O."""
        return None

    def partial_owner(self, block_hash: bytes) -> str | None:
        """Whose a partial block is that is here; None for a hash that is not here. No I/O."""
        return None

    def scan(self, cursor: int) -> tuple[list[bytes], int | None]:
        """With I/O: some of the blocks that `query` finds, from 0 on, and the cursor of the next ones; None: these were
        the last. A block that is here all the while comes once at least. Raises RemoteTierError.
        """
        return [], None

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        """The entries as they were stored, unverified; None where one is not here or cannot be read."""

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Make these as recent as if they had been loaded."""

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        """Keep what is not here yet; an exact entry replaces one that is not. Evicts until it fits.

        seen: `removals_seen` when the blocks were computed or read; None: now. A block that was removed after that, by
        any process, is not stored.
        """

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        """Drop these, and the partial blocks that go with them (`PartialPlace.is_removed_with`); afterwards `lookup`
        does not find them.

        remember: False where only the stored bytes are at fault: no other blocks go with them, and other processes may
        store the blocks that they have.
        """

    def clear(self) -> RemovalResult:
        """Drop all that `lookup` could find."""

    def refresh(self) -> None:
        """Take in what other processes have changed."""

    def was_emptied(self) -> bool:
        """Whether a refresh since the last call found all of this model's blocks gone, as after a flush. No I/O."""
        return False

    def lost_blocks(self) -> list[bytes]:
        """Blocks that a refresh since the last call found gone, though no removal by this model's processes and no
        eviction that `store` has returned explains that. No I/O.
        """
        return []

    def stats(self) -> TierStats:
        """Contents and failures; the traffic is counted by the manager."""

    def close(self) -> None:
        """Give back what the tier holds open. What it stores stays."""
