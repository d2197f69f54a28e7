"""The directory: which replicas have which blocks, as their events tell."""

from collections.abc import Sequence

from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from emberkv.core.hashing import BlockHash


class BlockIndex:
    """The blocks of many pools. Each block hash maps to a set of replicas, kept as the bits of one integer."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        """Different blocks known."""
        return len(self._holders)

    def apply(self, replica: int, event: Event) -> None:
        match event:
            case BlockStored():
                self._add(replica, event.block_hashes)
            case BlockRemoved():
                self._remove(replica, event.block_hashes)
            case AllBlocksCleared():
                self.forget(replica)

    def add(self, replica: int, block_hashes: Sequence[BlockHash]) -> None:
        """These are at ``replica``, too, as a snapshot says."""
        self._add(replica, block_hashes)

    def forget(self, replica: int) -> None:
        """Nothing of ``replica`` is left. Walks through all that is known."""
        bit = 1 << replica
        self._remove(replica, tuple(block_hash for block_hash, holders in self._holders.items() if holders & bit))

    def matches(self, block_hashes: Sequence[BlockHash], replicas: int) -> list[int]:
        """For each of ``replicas``, how many leading blocks of ``block_hashes`` it has."""
        depths = [0] * replicas
        remaining = (1 << replicas) - 1
        for depth, block_hash in enumerate(block_hashes):
            still = remaining & self._holders.get(block_hash, 0)
            if still != remaining:
                _mark(depths, remaining & ~still, depth)
                remaining = still
            if not remaining:
                return depths
        _mark(depths, remaining, len(block_hashes))
        return depths

    def _add(self, replica: int, block_hashes: Sequence[BlockHash]) -> None:
        bit = 1 << replica
        for block_hash in block_hashes:
            self._holders[block_hash] = self._holders.get(block_hash, 0) | bit

    def _remove(self, replica: int, block_hashes: Sequence[BlockHash]) -> None:
        bit = 1 << replica
        for block_hash in block_hashes:
            left = self._holders.get(block_hash, 0) & ~bit
            if left:
                self._holders[block_hash] = left
            else:
                self._holders.pop(block_hash, None)


def _mark(depths: list[int], bits: int, depth: int) -> None:
    """Set the depth of each replica whose bit is set."""
    while bits:
        lowest = bits & -bits
        depths[lowest.bit_length() - 1] = depth
        bits ^= lowest
