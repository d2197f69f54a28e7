"""The eviction policies by name: each an ordering of a few lines over one mechanism."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from emberkv.core.policies.eviction_policy import EntryCost, EvictionPolicy, K
from emberkv.core.policies.ranking import Ranking
from emberkv.core.policies.s3fifo import S3FIFO
from emberkv.errors import ConfigError


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
    """

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _rank(self, history: _History) -> float:
        return self._age + history.count * history.cost.cost / history.cost.size

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
