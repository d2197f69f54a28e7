"""Eviction policies as plainly as they can be said, in linear time, to compare the real ones with."""

from collections.abc import Callable
from dataclasses import dataclass

from emberkv.core.eviction_policy import Weight


@dataclass
class Entry:
    key: int
    weight: Weight
    born: int
    count: int = 1
    released: bool = False
    rank: float = 0.0
    touched: int = 0


class NaiveRanked:
    """Evicts the released entry of lowest (rank, time of last touch)."""

    def __init__(self, rank: Callable[[Entry, float], float]) -> None:
        self.rank = rank
        self.entries: dict[int, Entry] = {}
        self.now = 0
        self.age = 0.0

    def admit(self, key: int, weight: Weight) -> None:
        self.now += 1
        self.entries[key] = Entry(key, weight, self.now)

    def access(self, key: int) -> None:
        self.entries[key].count += 1
        if self.entries[key].released:
            self._touch(self.entries[key])

    def hold(self, key: int) -> None:
        self.entries[key].released = False

    def release(self, key: int) -> None:
        self.entries[key].released = True
        self._touch(self.entries[key])

    def remove(self, key: int) -> None:
        del self.entries[key]

    def evict(self) -> int:
        released = [entry for entry in self.entries.values() if entry.released]
        victim = min(released, key=lambda entry: (entry.rank, entry.touched))
        self.age = max(self.age, victim.rank)
        self.remove(victim.key)
        return victim.key

    def _touch(self, entry: Entry) -> None:
        self.now += 1
        entry.touched = self.now
        entry.rank = self.rank(entry, self.age)


class NaiveS3FIFO:
    """Two lists and a list of ghosts, walked from the front."""

    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.counts: dict[int, int] = {}
        self.released: set[int] = set()

    def admit(self, key: int, weight: Weight) -> None:
        self.counts[key] = 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def access(self, key: int) -> None:
        self.counts[key] = min(3, self.counts[key] + 1)

    def hold(self, key: int) -> None:
        self.released.remove(key)

    def release(self, key: int) -> None:
        self.released.add(key)
        if key not in self.small + self.main:
            self.main.append(key)

    def remove(self, key: int) -> None:
        del self.counts[key]
        self.released.discard(key)
        self.small = [each for each in self.small if each != key]
        self.main = [each for each in self.main if each != key]

    def evict(self) -> int:
        while True:
            small_first = bool(self.small) and (not self.main or 10 * len(self.small) >= len(self.counts))
            key = (self.small if small_first else self.main).pop(0)
            if key not in self.released:
                continue
            if self.counts[key]:
                self.counts[key] -= 0 if small_first else 1
                self.main.append(key)
                continue
            self.remove(key)
            if small_first:
                self.ghosts = [*self.ghosts, key][-max(1, len(self.counts)) :]
            return key
