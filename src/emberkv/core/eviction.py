"""Eviction policies: the order in which entries that nobody holds give up their place.

A policy knows keys and how they were used, never what they hold, so the same ones order a pool's blocks and a tier's
entries. Keys are identities, not places: what is remembered of a key must not pass to the next one in its slot.
An entry is admitted once, then held and released any number of times, and leaves by `evict` or `discard`.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from emberkv.core.hashing import Identity
from emberkv.errors import ConfigError

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Weight:
    """What an entry takes and what it is worth.

    size: bytes, or any unit shared by all entries. cost: the effort to make the entry again, in any shared unit.
    """

    size: float = 1.0
    cost: float = 1.0


class EvictionPolicy(ABC, Generic[K]):
    """Orders keys for eviction. Every operation is O(1), or O(log n) where a heap orders them."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys could be evicted now."""

    def admit(self, key: K, weight: Weight) -> None:
        """``key`` is new and held."""

    def access(self, keys: Iterable[K]) -> None:
        """A hit on each key, held or not."""

    @abstractmethod
    def hold(self, keys: Iterable[K]) -> None:
        """Released keys that may not be evicted until released again."""

    @abstractmethod
    def release(self, keys: Iterable[K]) -> None:
        """Held keys that may be evicted from now on, the first listed before the others where all else is equal."""

    @abstractmethod
    def evict(self) -> K:
        """Remove and return the key to go. Raises KeyError when none is released."""

    @abstractmethod
    def discard(self, key: K) -> None:
        """A released key whose entry went for another reason."""

    def forget(self, key: K) -> None:
        """A held key whose entry is no longer one: drop its history."""


class LRU(EvictionPolicy[K]):
    """Least recently used first; recency is the time of the last access or release."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def access(self, keys: Iterable[K]) -> None:
        order = self._order
        for key in keys:
            if key in order:
                order.move_to_end(key)

    def hold(self, keys: Iterable[K]) -> None:
        order = self._order
        for key in keys:
            del order[key]

    def release(self, keys: Iterable[K]) -> None:
        order = self._order
        for key in keys:
            order[key] = None

    def evict(self) -> K:
        return self._order.popitem(last=False)[0]

    def discard(self, key: K) -> None:
        del self._order[key]


@dataclass(slots=True)
class _History:
    born: int
    count: int
    weight: Weight


class _Ranked(EvictionPolicy[K]):
    """The lowest rank first, equal ranks in order of release or access. Ranks live in a heap with stale entries."""

    def __init__(self) -> None:
        self._histories: dict[K, _History] = {}
        self._ranks: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._ticks = 0

    @abstractmethod
    def _rank(self, history: _History) -> float: ...

    def __len__(self) -> int:
        return len(self._ranks)

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def admit(self, key: K, weight: Weight) -> None:
        self._histories[key] = _History(self._tick(), 1, weight)

    def access(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._histories[key].count += 1
            if key in self._ranks:
                self._push(key)

    def hold(self, keys: Iterable[K]) -> None:
        for key in keys:
            del self._ranks[key]

    def release(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._push(key)

    def _push(self, key: K) -> None:
        rank = (self._rank(self._histories[key]), self._tick())
        self._ranks[key] = rank
        heappush(self._heap, (*rank, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(value, tick, key) for key, (value, tick) in self._ranks.items()]
            heapify(self._heap)

    def evict(self) -> K:
        if not self._ranks:
            raise KeyError("nothing is released")
        while True:
            value, tick, key = heappop(self._heap)
            if self._ranks.get(key) == (value, tick):
                self._on_evict(value)
                self.discard(key)
                return key

    def _on_evict(self, rank: float) -> None:
        """For policies whose ranks depend on what has been evicted."""

    def discard(self, key: K) -> None:
        del self._ranks[key]
        del self._histories[key]

    def forget(self, key: K) -> None:
        del self._histories[key]


class LFU(_Ranked[K]):
    """Least frequently used first; equal counts, least recently used first. An evicted key's count is forgotten."""

    def _rank(self, history: _History) -> float:
        return history.count


class FIFO(_Ranked[K]):
    """Oldest first, by admission; use does not matter."""

    def _rank(self, history: _History) -> float:
        return history.born


class GreedyDual(_Ranked[K]):
    """The entry cheapest to lose first: its count times its cost per unit of size, aged.

    GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998): rank = age + count * cost / size, and the age rises to the
    rank of each evicted entry, so that what was costly once and is never used again goes in the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _rank(self, history: _History) -> float:
        return self._age + history.count * history.weight.cost / history.weight.size

    def _on_evict(self, rank: float) -> None:
        self._age = max(self._age, rank)


class S3FIFO(EvictionPolicy[K]):
    """Three FIFO queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    New keys wait in a small queue (a tenth of all); those accessed there move to the main queue, the others leave
    and are remembered as ghosts, which enter the main queue if they come back. The main queue gives each key as many
    further rounds as it had accesses, at most three. A held key found in a queue leaves it, and joins the main queue
    when it is released, so that eviction never walks over held keys twice.
    """

    _SMALL_SHARE = 0.1
    _MAX_COUNT = 3

    def __init__(self) -> None:
        self._counts: dict[K, int] = {}
        self._released: set[K] = set()
        self._small: OrderedDict[K, None] = OrderedDict()
        self._main: OrderedDict[K, None] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._released)

    def admit(self, key: K, weight: Weight) -> None:
        self._counts[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def access(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._counts[key] = min(self._counts[key] + 1, self._MAX_COUNT)

    def hold(self, keys: Iterable[K]) -> None:
        self._released.difference_update(keys)

    def release(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._released.add(key)
            if key not in self._small:
                self._main.setdefault(key)

    def evict(self) -> K:
        if not self._released:
            raise KeyError("nothing is released")
        while True:
            small_is_full = len(self._small) >= self._SMALL_SHARE * len(self._counts)
            from_small = self._small and (small_is_full or not self._main)
            key = self._pass_small() if from_small else self._pass_main()
            if key is not None:
                return key

    def _pass_small(self) -> K | None:
        """Take the small queue's oldest: evicted, moved to the main queue (None), or left to its holder (None)."""
        key, _ = self._small.popitem(last=False)
        if key not in self._released:
            return None
        if self._counts[key] > 0:
            self._main[key] = None
            return None
        self._remove(key)
        self._ghosts[key] = None
        while len(self._ghosts) > max(len(self._counts), 1):
            self._ghosts.popitem(last=False)
        return key

    def _pass_main(self) -> K | None:
        """Take the main queue's oldest: evicted, sent round again (None), or left to its holder (None)."""
        key, _ = self._main.popitem(last=False)
        if key not in self._released:
            return None
        if self._counts[key] > 0:
            self._counts[key] -= 1
            self._main[key] = None
            return None
        self._remove(key)
        return key

    def _remove(self, key: K) -> None:
        self._released.discard(key)
        del self._counts[key]

    def discard(self, key: K) -> None:
        self.forget(key)

    def forget(self, key: K) -> None:
        self._remove(key)
        self._small.pop(key, None)
        self._main.pop(key, None)


_POLICIES: dict[str, Callable[[], EvictionPolicy[Identity]]] = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "s3fifo": S3FIFO,
    "greedy-dual": GreedyDual,
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str) -> EvictionPolicy[Identity]:
    """A fresh policy over block identities. Raises ConfigError for a name outside POLICY_NAMES."""
    if name not in _POLICIES:
        raise ConfigError(f"eviction policy {name!r} is unknown; use one of {', '.join(POLICY_NAMES)}")
    return _POLICIES[name]()
