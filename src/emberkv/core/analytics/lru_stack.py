"""The stack of all that was used, most recent on top: how deep a key lies is how large an LRU cache must be to have it.

Mattson et al., "Evaluation techniques for storage hierarchies" (IBM Systems Journal, 1970): an LRU cache of any size
holds the top of one and the same stack, so one pass over the uses gives the hits of every size.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_FEWEST_PLACES = 1024


class LRUStack(Generic[K]):
    """Each operation is O(log n) a key, n being the keys in the stack.

    A key's place is the number of uses before its last one; a use leaves a hole in the key's old place. Keys above a
    place are the places above it less their holes, which a Fenwick tree counts. Full places are numbered anew.
    """

    def __init__(self) -> None:
        self._places: OrderedDict[K, int] = OrderedDict()
        self._next = 0
        self._holes = 0
        self._tree = [0] * (_FEWEST_PLACES + 1)

    def __len__(self) -> int:
        return len(self._places)

    def depths(self, keys: Iterable[K]) -> list[int | None]:
        """How many keys an LRU cache must hold to have each; None for one that is not in the stack."""
        return [self._depth(self._places.get(key)) for key in keys]

    def _depth(self, place: int | None) -> int | None:
        if place is None:
            return None
        tree, holes_below, at = self._tree, 0, place
        while at:
            holes_below += tree[at]
            at &= at - 1
        return self._next - place - (self._holes - holes_below)

    def use(self, keys: Sequence[K]) -> None:
        """Put different keys on top, the first one uppermost, as a request's blocks are released tail first."""
        if self._next + len(keys) >= len(self._tree):
            self._renumber(len(keys))
        places, tree, size = self._places, self._tree, len(self._tree)
        for key in reversed(keys):
            place = places.pop(key, None)
            if place is not None:
                self._holes += 1
                at = place + 1
                while at < size:
                    tree[at] += 1
                    at += at & -at
            places[key] = self._next
            self._next += 1

    def drop_oldest(self) -> K:
        """Remove and return the lowest key. Raises KeyError when there is none."""
        return self._places.popitem(last=False)[0]

    def drop_unless(self, kept: Callable[[K], bool]) -> None:
        """Remove every key that is not to be kept. O(n)."""
        self._places = OrderedDict((key, place) for key, place in self._places.items() if kept(key))
        self._renumber(0)

    def _renumber(self, coming: int) -> None:
        for place, key in enumerate(self._places):
            self._places[key] = place
        self._next = len(self._places)
        self._holes = 0
        self._tree = [0] * (2 * (self._next + coming) + _FEWEST_PLACES)
