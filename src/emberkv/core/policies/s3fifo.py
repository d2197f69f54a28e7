"""The S3-FIFO eviction policy: scans pass through a small queue and leave the main one alone."""

from collections import OrderedDict
from collections.abc import Iterable

from emberkv.core.policies.eviction_policy import EntryCost, EvictionPolicy, K


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
