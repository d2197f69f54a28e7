"""What a tier's worker is given to do, one after the other."""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.codec import BlockRecord, encode_record
from emberkv.tiers.partial import PartialPlace


@dataclass(eq=False, slots=True)
class QueuedBlock:
    """A block to store; its bytes are made by the first worker that needs them. partial: where it lies, if it is a
    partial block. size: what it keeps in memory.
    """

    record: BlockRecord
    owner: str
    entry: TierEntry | None = None
    partial: PartialPlace | None = None

    @property
    def size(self) -> int:
        return len(self.entry.data) if self.entry else len(self.record.payload) + len(self.record.tokens)

    def encoded(self, namespace: bytes) -> TierEntry:
        if self.entry is None:
            data = encode_record(self.record, namespace=namespace)
            self.entry = TierEntry(self.record.block_hash, self.owner, data, self.record.exact, self.partial)
        return self.entry


@dataclass(eq=False, slots=True)
class StoreJob:
    """seen: see `Tier.store`."""

    blocks: list[QueuedBlock]
    size: int
    seen: int


@dataclass(eq=False, slots=True)
class TouchJob:
    block_hashes: Sequence[bytes]
    size: int


@dataclass(eq=False, slots=True)
class CheckJob:
    """Read these blocks again and remove those that are not sound. They are not found until that is done. partial:
    where those of them lie that are no full blocks.
    """

    block_hashes: Collection[bytes]
    partial: Mapping[bytes, PartialPlace] = field(default_factory=dict)
    size: int = 0

    def hides(self, block_hash: bytes) -> bool:
        return block_hash in self.block_hashes

    def hides_at(self, place: PartialPlace) -> bool:
        return False


def _answer() -> "Future[RemovalResult]":
    """A future that its receiver cannot cancel: a removal is carried out in any case."""
    future: Future[RemovalResult] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False, slots=True)
class RemoveJob:
    """block_hashes: None: all. They are not found from now on."""

    block_hashes: Collection[bytes] | None
    result: "Future[RemovalResult]" = field(default_factory=_answer)
    size: int = 0

    def hides(self, block_hash: bytes) -> bool:
        return self.block_hashes is None or block_hash in self.block_hashes

    def hides_at(self, place: PartialPlace) -> bool:
        """Whether it takes a partial block along that lies there."""
        return self.block_hashes is None or place.is_removed_with(self.block_hashes)


Job = StoreJob | TouchJob | CheckJob | RemoveJob
