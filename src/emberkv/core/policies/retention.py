"""Retention: entries that are to be kept until a time are evicted after all others. A priority, never a lock."""

from collections.abc import Iterable, Sequence
from typing import Any

from emberkv.core.policies.eviction import EntryCost, EvictionPolicy, K, Ranking
from emberkv.errors import ConfigError


class RetentionBudget:
    """What several `Retaining` policies may retain together, such as those of all tenants of one pool.

    Beyond ``max_bytes``, the policy that retains most gives up what it would give up next.
    """

    def __init__(self, max_bytes: float) -> None:
        if max_bytes < 0:
            raise ConfigError(f"at most {max_bytes:g} bytes are to be retained; it must be 0 or more")
        self._max_bytes = max_bytes
        self._members: list[Retaining[Any]] = []

    @property
    def retained_bytes(self) -> float:
        return sum(member.retained_bytes for member in self._members)

    def join(self, member: "Retaining[Any]") -> None:
        self._members.append(member)

    def enforce(self) -> None:
        while self.retained_bytes > self._max_bytes:
            max(self._members, key=lambda member: member.retained_bytes).give_up_one()


class Retaining(EvictionPolicy[K]):
    """Another policy's order for all keys but those retained, which go last: first those whose retention ends soonest.

    inner: has retained keys for held ones. It knows no owners; put `FairShares` round this one, not inside.
    max_bytes: what retained keys may weigh together, held ones included. Beyond it the retention that ends soonest
    ends; of those that end at once, the one that began last, so that a chain's beginning is kept.
    shared: a budget for this policy and others together.
    """

    def __init__(self, inner: EvictionPolicy[K], *, max_bytes: float, shared: RetentionBudget | None = None) -> None:
        if max_bytes < 0:
            raise ConfigError(f"at most {max_bytes:g} bytes are to be retained; it must be 0 or more")
        self._inner = inner
        self._max_bytes = max_bytes
        self._sizes: dict[K, float] = {}
        self._released: set[K] = set()
        self._retained: Ranking[K, tuple[float, int]] = Ranking()  # by end, and the latest first
        self._evictable: Ranking[K, tuple[float, int]] = Ranking()  # of these, the released ones
        self._retained_bytes = 0.0
        self._ticks = 0
        self._shared = shared
        if shared is not None:
            shared.join(self)

    @property
    def retained_bytes(self) -> float:
        return self._retained_bytes

    def __len__(self) -> int:
        return len(self._released)

    def is_retained(self, key: K) -> bool:
        return key in self._retained

    def retain(self, keys: Iterable[K], until: float) -> int:
        """See `EvictionPolicy.retain`. A key that is retained for longer already stays so."""
        wanted = [key for key in keys if key in self._sizes]
        for key in wanted:
            if key not in self._retained:
                self._begin(key, until)
            elif self._retained.rank(key)[0] < until:
                self._set_end(key, until)
        while self._retained_bytes > self._max_bytes:
            self.give_up_one()
        if self._shared is not None:
            self._shared.enforce()
        return sum(key in self._retained for key in wanted)

    def give_up_one(self) -> None:
        """End the retention that ends soonest. Raises KeyError where nothing is retained."""
        key, _ = self._retained.first()
        self._retained.remove(key)
        self._ended([key])

    def unretain(self, keys: Iterable[K]) -> None:
        ended = [key for key in dict.fromkeys(reversed(list(keys))) if key in self._retained]
        for key in ended:
            self._retained.remove(key)
        self._ended(ended)

    def expire(self, now: float) -> None:
        ended: list[K] = []
        while self._retained and self._retained.first()[1][0] <= now:
            ended.append(self._retained.first()[0])
            self._retained.remove(ended[-1])
        self._ended(ended)

    def admit(self, key: K, cost: EntryCost) -> None:
        self._sizes[key] = cost.size
        self._inner.admit(key, cost)

    def access(self, keys: Iterable[K]) -> None:
        self._inner.access(keys)

    def hold(self, keys: Iterable[K]) -> None:
        others = []
        for key in keys:
            self._released.remove(key)
            if key in self._retained:
                self._evictable.remove(key)
            else:
                others.append(key)
        self._inner.hold(others)

    def release(self, keys: Iterable[K]) -> None:
        others = []
        for key in keys:
            self._released.add(key)
            if key in self._retained:
                self._evictable.place(key, self._retained.rank(key))
            else:
                others.append(key)
        self._inner.release(others)

    def evict(self) -> K:
        if len(self._inner):
            key = self._inner.evict()
            self._released.remove(key)
            del self._sizes[key]
        else:
            key, _ = self._evictable.first()
            self.discard(key)
        return key

    def discard(self, key: K) -> None:
        self._released.remove(key)
        if key in self._retained:
            self._evictable.remove(key)
            self.forget(key)
        else:
            del self._sizes[key]
            self._inner.discard(key)

    def forget(self, key: K) -> None:
        size = self._sizes.pop(key)
        if key in self._retained:
            self._retained.remove(key)
            self._retained_bytes -= size
        self._inner.forget(key)

    def _begin(self, key: K, until: float) -> None:
        self._retained_bytes += self._sizes[key]
        if key in self._released:
            self._inner.hold((key,))
        self._set_end(key, until)

    def _set_end(self, key: K, until: float) -> None:
        self._ticks += 1
        rank = (until, -self._ticks)
        self._retained.place(key, rank)
        if key in self._released:
            self._evictable.place(key, rank)

    def _ended(self, keys: Sequence[K]) -> None:
        """Give keys whose retention has ended back to the inner policy. keys: of a chain the last first, and together,
        because policies order what is released at once.
        """
        self._retained_bytes -= sum(self._sizes[key] for key in keys)
        released = [key for key in keys if key in self._released]
        for key in released:
            self._evictable.remove(key)
        self._inner.release(released)
