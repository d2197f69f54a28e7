"""Eviction policies: the order in which entries without a holder are evicted.

A policy knows keys and how they were used, never what they hold, so the same ones order a pool's blocks and a tier's
entries. Keys are block hashes, not block ids: what is remembered of a key must not pass to the next one in the same
block. An entry is admitted once, then held and released any number of times, and leaves by `evict` or `discard`.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

from emberkv.errors import ConfigError

K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound=tuple[Any, ...])


@dataclass(frozen=True, slots=True)
class EntryCost:
    """What an entry takes and what it is worth.

    size: bytes, or any unit shared by all entries. cost: the effort to make the entry again, in any shared unit.
    owner: the tenant whose share of the space it takes; "" where there is only one.
    """

    size: float = 1.0
    cost: float = 1.0
    owner: str = ""


class EvictionPolicy(ABC, Generic[K]):
    """Orders keys for eviction. Every operation is O(1), or O(log n) where a heap orders them."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys could be evicted now."""

    def admit(self, key: K, cost: EntryCost) -> None:
        """``key`` is new and held."""

    def admit_many(self, keys: Sequence[K], costs: Iterable[EntryCost]) -> None:
        """As `admit` of each key in turn, with its cost."""
        for key, cost in zip(keys, costs, strict=True):
            self.admit(key, cost)

    def access(self, keys: Iterable[K]) -> None:
        """A hit on each key, held or not."""

    @abstractmethod
    def hold(self, keys: Iterable[K]) -> None:
        """Released keys that may not be evicted until released again."""

    @abstractmethod
    def release(self, keys: Iterable[K]) -> None:
        """Held keys that may be evicted from now on, the first listed before the others where all else is equal. Of a
        chain of blocks, the last one is listed first.
        """

    @abstractmethod
    def evict(self) -> K:
        """Remove and return the key to go. Raises KeyError when none is released."""

    def evict_for(self, owner: str) -> K:
        """As `evict`, to make room for an entry of ``owner``."""
        return self.evict()

    def evict_many_for(self, owner: str, count: int) -> list[K]:
        """As `evict_for`, ``count`` times."""
        return [self.evict_for(owner) for _ in range(count)]

    def available_to(self, owner: str) -> int:
        """How many keys may be evicted to make room for entries of ``owner``."""
        return len(self)

    def bytes_by_owner(self) -> Mapping[str, float]:
        """What each owner has, held or not; empty where owners make no difference."""
        return {}

    def bytes_of(self, owner: str) -> float | None:
        """What ``owner`` has, held or not; None where owners make no difference."""
        return None

    def headroom(self, owner: str) -> float:
        """How many bytes more ``owner`` may have before its quota forbids it to keep what it has."""
        return math.inf

    def over_quota(self) -> Collection[str]:
        """The owners of what `evict_surplus` would return."""
        return ()

    def reserved(self, size: float) -> int:
        """How many entries of ``size`` may at worst be kept from an owner for the sake of others."""
        return 0

    def guaranteed(self, owner: str, size: float) -> int:
        """How many entries of ``size`` ``owner`` may have that are never evicted for the sake of others."""
        return 0

    @abstractmethod
    def discard(self, key: K) -> None:
        """A released key whose entry went for another reason."""

    def evict_surplus(self) -> Sequence[K]:
        """Remove and return the released keys that a quota forbids; to be called after each admit and release."""
        return ()

    def forget(self, key: K) -> None:
        """A held key whose entry is no longer one: drop its history."""

    def retain(self, keys: Iterable[K], until: float) -> int:
        """Evict the keys after all others until then, as far as there is room; returns how many are retained.

        until: on the caller's clock; infinity for good. The keys in chain order; those that are no entries are
        passed over.
        """
        return 0

    def unretain(self, keys: Iterable[K]) -> None:
        """The keys are retained no longer."""

    def expire(self, now: float) -> None:
        """End the retention of what was retained until ``now`` or before."""


_MOST_OUTDATED = 64
"""Beside as many as there are keys."""


class Ranking(Generic[K, R]):
    """Keys in order of their ranks: a heap whose outdated entries are passed over and, when they are many, removed.

    Each operation is O(log n) amortized, looking keys up O(1). Ranks of different keys must differ.
    """

    def __init__(self) -> None:
        self._ranks: dict[K, R] = {}
        self._heap: list[tuple[R, K]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: K) -> bool:
        return key in self._ranks

    def rank(self, key: K) -> R:
        """Raises KeyError for a key that is not in."""
        return self._ranks[key]

    def place(self, key: K, rank: R) -> None:
        """Put ``key`` in, or move it."""
        self._ranks[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + _MOST_OUTDATED:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapify(self._heap)

    def remove(self, key: K) -> None:
        """Raises KeyError for a key that is not in."""
        del self._ranks[key]

    def first(self) -> tuple[K, R]:
        """The key of lowest rank, and the rank. Raises KeyError when there is none."""
        heap = self._heap
        while self._ranks:
            rank, key = heap[0]
            if self._ranks.get(key) == rank:
                return key, rank
            heappop(heap)
        raise KeyError("nothing is ranked")


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

    def admit(self, key: K, cost: EntryCost) -> None:
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


class LRU(EvictionPolicy[K]):
    """Least recently used first; recency is the time of the last access or release."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def available_to(self, owner: str) -> int:
        return len(self._order)

    def admit_many(self, keys: Sequence[K], costs: Iterable[EntryCost]) -> None:
        """Recency begins with the release, and costs make no difference."""

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

    def evict_many_for(self, owner: str, count: int) -> list[K]:
        popitem = self._order.popitem
        return [popitem(last=False)[0] for _ in range(count)]

    def discard(self, key: K) -> None:
        del self._order[key]


@dataclass(slots=True)
class _History:
    born: int
    count: int
    cost: EntryCost


class _Ranked(EvictionPolicy[K]):
    """The lowest rank first, equal ranks in order of release or access."""

    def __init__(self) -> None:
        self._histories: dict[K, _History] = {}
        self._ranks: Ranking[K, tuple[float, int]] = Ranking()
        self._ticks = 0

    @abstractmethod
    def _rank(self, history: _History) -> float: ...

    def __len__(self) -> int:
        return len(self._ranks)

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def admit(self, key: K, cost: EntryCost) -> None:
        self._histories[key] = _History(self._tick(), 1, cost)

    def access(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._histories[key].count += 1
            if key in self._ranks:
                self._push(key)

    def hold(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._ranks.remove(key)

    def release(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._push(key)

    def _push(self, key: K) -> None:
        self._ranks.place(key, (self._rank(self._histories[key]), self._tick()))

    def evict(self) -> K:
        key, (rank, _) = self._ranks.first()
        self._on_evict(rank)
        self.discard(key)
        return key

    def _on_evict(self, rank: float) -> None:
        """For policies whose ranks depend on what has been evicted."""

    def discard(self, key: K) -> None:
        self._ranks.remove(key)
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

    Entries that are released together rank no lower than those listed before them: without a chain's first block the
    others cannot be found, so that it is worth what they are. By their costs alone the first blocks, whose tokens
    attend to fewer others, would be evicted before the rest of their chain.
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _rank(self, history: _History) -> float:
        return self._age + history.count * history.cost.cost / history.cost.size

    def release(self, keys: Iterable[K]) -> None:
        rank = 0.0
        for key in keys:
            rank = max(rank, self._rank(self._histories[key]))
            self._ranks.place(key, (rank, self._tick()))

    def _on_evict(self, rank: float) -> None:
        self._age = max(self._age, rank)


_POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {
    "lru": LRU,
    "lfu": LFU,
    "fifo": FIFO,
    "s3fifo": S3FIFO,
    "greedy-dual": GreedyDual,
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str) -> EvictionPolicy[K]:
    """A fresh policy, over keys of any one type. Raises ConfigError for a name outside POLICY_NAMES."""
    if name not in _POLICIES:
        raise ConfigError(f"eviction policy {name!r} is unknown; use one of {', '.join(POLICY_NAMES)}")
    return _POLICIES[name]()
