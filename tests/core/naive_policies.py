"""Eviction policies as plainly as they can be said, in linear time, to compare the real ones with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from emberkv.core.policies.eviction import EntryCost
from emberkv.core.policies.fair_shares import Share


class Naive(Protocol):
    """What all models do; each key by itself."""

    def admit(self, key: int, cost: EntryCost) -> None: ...
    def access(self, key: int) -> None: ...
    def hold(self, key: int) -> None: ...
    def release(self, key: int) -> None: ...
    def remove(self, key: int) -> None: ...
    def evict(self) -> int: ...


@dataclass
class Entry:
    key: int
    cost: EntryCost
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

    def admit(self, key: int, cost: EntryCost) -> None:
        self.now += 1
        self.entries[key] = Entry(key, cost, self.now)

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

    def admit(self, key: int, cost: EntryCost) -> None:
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


class NaiveRetaining:
    """Another model's order, but retained keys last."""

    def __init__(self, inner: Naive, max_bytes: float) -> None:
        self.inner = inner
        self.max_bytes = max_bytes
        self.sizes: dict[int, float] = {}
        self.released: set[int] = set()
        self.ends: dict[int, tuple[float, int]] = {}
        self.now = 0

    def admit(self, key: int, cost: EntryCost) -> None:
        self.sizes[key] = cost.size
        self.inner.admit(key, cost)

    def access(self, key: int) -> None:
        self.inner.access(key)

    def hold(self, key: int) -> None:
        self.released.remove(key)
        if key not in self.ends:
            self.inner.hold(key)

    def release(self, key: int) -> None:
        self.released.add(key)
        if key not in self.ends:
            self.inner.release(key)

    def remove(self, key: int) -> None:
        self.ends.pop(key, None)
        self.released.discard(key)
        del self.sizes[key]
        self.inner.remove(key)

    def evict(self) -> int:
        if self.released - self.ends.keys():
            key = self.inner.evict()
            self.released.remove(key)
            del self.sizes[key]
            return key
        key = min(self.released, key=lambda each: self.ends[each])
        self.remove(key)
        return key

    def retain(self, key: int, until: float) -> int:
        if key not in self.sizes:
            return 0
        if key not in self.ends and key in self.released:
            self.inner.hold(key)
        if key not in self.ends or self.ends[key][0] < until:
            self.now += 1
            self.ends[key] = (until, -self.now)
        while sum(self.sizes[each] for each in self.ends) > self.max_bytes:
            self.unretain(min(self.ends, key=lambda each: self.ends[each]))
        return int(key in self.ends)

    def unretain(self, key: int) -> None:
        if key in self.ends:
            del self.ends[key]
            if key in self.released:
                self.inner.release(key)

    def expire(self, now: float) -> None:
        for key in sorted(self.ends, key=lambda each: self.ends[each]):
            if self.ends[key][0] <= now:
                self.unretain(key)


class NaiveFairShares:
    """One model an owner; the owner with most above its floor loses, as the entries say."""

    def __init__(self, make_inner: Callable[[], NaiveRetaining], shares: dict[str, Share], default: Share) -> None:
        self.make_inner = make_inner
        self.shares = shares
        self.default = default
        self.inners: dict[str, NaiveRetaining] = {}
        self.largest: dict[str, float] = {}
        self.owners: dict[int, str] = {}
        self.sizes: dict[int, float] = {}
        self.released: set[int] = set()

    def share(self, owner: str) -> Share:
        return self.shares.get(owner, self.default)

    def bytes_of(self, owner: str) -> float:
        return sum(size for key, size in self.sizes.items() if self.owners[key] == owner)

    def released_of(self, owner: str) -> int:
        return sum(self.owners[key] == owner for key in self.released)

    def spare(self, owner: str) -> float:
        return self.bytes_of(owner) - self.largest[owner] - self.share(owner).floor_bytes

    def admit(self, key: int, cost: EntryCost) -> None:
        owner = cost.owner
        self.inners.setdefault(owner, self.make_inner()).admit(key, cost)
        self.largest[owner] = max(self.largest.get(owner, 0), cost.size)
        self.owners[key], self.sizes[key] = owner, cost.size

    def access(self, key: int) -> None:
        self.inners[self.owners[key]].access(key)

    def hold(self, key: int) -> None:
        self.released.remove(key)
        self.inners[self.owners[key]].hold(key)

    def release(self, key: int) -> None:
        self.released.add(key)
        self.inners[self.owners[key]].release(key)

    def remove(self, key: int) -> None:
        self.inners[self.owners[key]].remove(key)
        self._strike(key)

    def evict(self) -> int:
        return self._evict_from(self._loser())

    def evict_for(self, owner: str) -> int:
        loser = self._loser()
        return self._evict_from(owner if self.spare(loser) < 0 and self.released_of(owner) else loser)

    def available_to(self, owner: str) -> int:
        count = 0
        for other in self.inners:
            size, released = self.bytes_of(other), self.released_of(other)
            while released and (other == owner or size - self.largest[other] >= self.share(other).floor_bytes):
                size, released, count = size - self.largest[other], released - 1, count + 1
        return count

    def surplus(self) -> set[int]:
        gone = set()
        for owner in self.inners:
            quota = self.share(owner).quota_bytes
            while quota is not None and self.bytes_of(owner) > quota and self.released_of(owner):
                gone.add(self._evict_from(owner))
        return gone

    def retain(self, key: int, until: float) -> int:
        return self.inners[self.owners[key]].retain(key, until) if key in self.owners else 0

    def unretain(self, key: int) -> None:
        if key in self.owners:
            self.inners[self.owners[key]].unretain(key)

    def expire(self, now: float) -> None:
        for inner in self.inners.values():
            inner.expire(now)

    def _loser(self) -> str:
        owners = sorted({self.owners[key] for key in self.released})
        return max(owners, key=self.spare)  # the first of equal ones

    def _evict_from(self, owner: str) -> int:
        key = self.inners[owner].evict()
        self._strike(key)
        return key

    def _strike(self, key: int) -> None:
        self.released.discard(key)
        del self.owners[key], self.sizes[key]
