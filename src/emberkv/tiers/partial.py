"""Partial blocks in a tier: which follow a full block, and which of them a removal names.

A partial block has a hash of its own, which says neither what it follows nor how many tokens it holds. A prompt finds
it by both, and a removal names it by the block that it follows.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from emberkv.core.hashing import partial_siblings_hash


@dataclass(frozen=True, slots=True)
class PartialPlace:
    """Where a partial block lies. parent: what enters its hash. previous: the hash of the full block before it, which
    is the parent without a tenant's salt. count: its tokens.
    """

    parent: bytes
    previous: bytes
    count: int

    def removed_by(self) -> tuple[bytes, bytes]:
        """What names it in a removal, its own hash aside, as in `BlockPool.remove`."""
        return self.previous, partial_siblings_hash(self.parent)

    def is_removed_with(self, block_hashes: Collection[bytes]) -> bool:
        """Whether a removal of these takes it along."""
        return any(name in block_hashes for name in self.removed_by())


class PartialIndex:
    """The partial blocks of one model in a tier. The caller holds a lock around all methods but `counts` and
    `place`.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, PartialPlace] = {}
        self._counts: dict[bytes, dict[int, int]] = {}  # by parent, how many have so many tokens
        self._named: dict[bytes, dict[bytes, None]] = {}  # by what names them in a removal

    def __len__(self) -> int:
        return len(self._places)

    def place(self, block_hash: bytes) -> PartialPlace | None:
        """None where there is no such partial block."""
        return self._places.get(block_hash)

    def counts(self, parent: bytes) -> list[int]:
        """The numbers of tokens that partial blocks with this parent have, each once, in the order of the latest `add`
        of each.
        """
        return list(self._counts.get(parent, ()))

    def removed_with(self, block_hashes: Iterable[bytes]) -> list[bytes]:
        """The partial blocks that a removal of these takes along; see `PartialPlace.is_removed_with`."""
        if not self._places:
            return []
        return list(dict.fromkeys(each for name in block_hashes for each in self._named.get(name, ())))

    def add(self, block_hash: bytes, place: PartialPlace) -> None:
        """Enter one that is not entered yet."""
        self._places[block_hash] = place
        counts = self._counts.setdefault(place.parent, {})
        counts[place.count] = counts.pop(place.count, 0) + 1
        for name in place.removed_by():
            self._named.setdefault(name, {})[block_hash] = None

    def discard(self, block_hash: bytes) -> None:
        """Strike one off; a hash that is not entered is ignored."""
        place = self._places.pop(block_hash, None)
        if place is None:
            return
        counts = self._counts[place.parent]
        counts[place.count] -= 1
        if not counts[place.count]:
            del counts[place.count]
        if not counts:
            del self._counts[place.parent]
        for name in place.removed_by():
            named = self._named[name]
            del named[block_hash]
            if not named:
                del self._named[name]

    def clear(self) -> None:
        """Strike all off."""
        self._places.clear()
        self._counts.clear()
        self._named.clear()
