"""Fair shares of one space: each owner has a floor that others cannot push it below, and a quota it cannot exceed."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Generic

from emberkv.core.policies.eviction import EntryCost, EvictionPolicy, K, Ranking
from emberkv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """floor_bytes: what others leave to an owner. quota_bytes: what it may have; None for all there is.

    Raises ConfigError for a negative size and for a floor above the quota.
    """

    floor_bytes: int = 0
    quota_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.floor_bytes < 0 or (self.quota_bytes is not None and self.quota_bytes < self.floor_bytes):
            raise ConfigError(
                f"a share of at least {self.floor_bytes} and at most {self.quota_bytes} bytes; "
                "the floor must be 0 or more, and the quota no less than the floor"
            )


def check_floors(shares: Mapping[str, Share], capacity_bytes: int, space: str) -> None:
    """Raises ConfigError for floors that add up to more than ``capacity_bytes``. space: what the message calls it."""
    floors = sum(share.floor_bytes for share in shares.values())
    if floors > capacity_bytes:
        raise ConfigError(f"the floors in {space} add up to {floors:,} bytes; it has {capacity_bytes:,}")


class _Account(Generic[K]):
    """What one owner has: keys ordered by its own policy, and all their bytes, held ones included.

    Not a dataclass: mypyc cannot compile a generic one.
    """

    __slots__ = ("largest", "losable", "policy", "share", "size")

    def __init__(self, share: Share, policy: EvictionPolicy[K]) -> None:
        self.share = share
        self.policy = policy
        self.size = 0.0
        self.largest = 0.0
        self.losable = 0

    @property
    def spare(self) -> float:
        """Bytes above the floor that would be left after losing any one entry; below 0, others may not take one."""
        return self.size - self.largest - self.share.floor_bytes

    @property
    def is_over_quota(self) -> bool:
        quota = self.share.quota_bytes
        return quota is not None and self.size > quota and len(self.policy) > 0

    def count_losable(self) -> int:
        """How many entries may go before the floor is reached, if all are as large as the largest one."""
        released = len(self.policy)
        return min(released, int(self.spare // self.largest) + 1) if released and self.spare >= 0 else 0


class FairShares(EvictionPolicy[K]):
    """One policy for each owner (`EntryCost.owner`); between owners, the one with most above its floor loses first.

    make_inner: a fresh policy, which orders one owner's keys. shares: by owner; default: of those not in it, without a
    floor. What an owner has is counted in bytes (`EntryCost.size`), held entries included. Where two have equally much,
    the first by name loses.

    `evict_for` never takes an owner below its floor for the sake of another one while there is anything else to take,
    and `available_to` counts what else there is. Entries of one size make that exact; for others a floor is kept with
    the largest entry of its owner to spare.
    """

    def __init__(
        self, make_inner: Callable[[], EvictionPolicy[K]], shares: Mapping[str, Share], default: Share
    ) -> None:
        if default.floor_bytes:
            raise ConfigError(
                f"a floor of {default.floor_bytes} bytes for all owners; a floor is of one owner, by name"
            )
        self._make_inner = make_inner
        self._shares = dict(shares)
        self._default = default
        self._accounts: dict[str, _Account[K]] = {}
        self._entries: dict[K, tuple[str, float]] = {}
        self._order: Ranking[str, tuple[float, str]] = Ranking()
        self._over_quota: dict[str, None] = {}
        self._released = 0
        self._losable = 0

    def __len__(self) -> int:
        return self._released

    def bytes_by_owner(self) -> dict[str, float]:
        return {owner: account.size for owner, account in self._accounts.items() if account.size}

    def admit(self, key: K, cost: EntryCost) -> None:
        owner = cost.owner
        account = self._accounts.get(owner)
        if account is None:
            account = _Account(self._shares.get(owner, self._default), self._make_inner())
            self._accounts[owner] = account
        self._entries[key] = (owner, cost.size)
        account.size += cost.size
        account.largest = max(account.largest, cost.size)
        account.policy.admit(key, cost)
        self._update(owner)

    def access(self, keys: Iterable[K]) -> None:
        for owner, some in self._by_owner(keys):
            self._accounts[owner].policy.access(some)

    def hold(self, keys: Iterable[K]) -> None:
        for owner, some in self._by_owner(keys):
            self._accounts[owner].policy.hold(some)
            self._released -= len(some)
            self._update(owner)

    def release(self, keys: Iterable[K]) -> None:
        for owner, some in self._by_owner(keys):
            self._accounts[owner].policy.release(some)
            self._released += len(some)
            self._update(owner)

    def evict(self) -> K:
        owner, _ = self._order.first()
        return self._evict_from(owner)

    def evict_for(self, owner: str) -> K:
        victim, (negative_spare, _) = self._order.first()
        return self._evict_from(owner if negative_spare > 0 and owner in self._order else victim)

    def available_to(self, owner: str) -> int:
        account = self._accounts.get(owner)
        return self._losable + (len(account.policy) - account.losable if account is not None else 0)

    def bytes_of(self, owner: str) -> float | None:
        account = self._accounts.get(owner)
        return 0.0 if account is None else account.size

    def headroom(self, owner: str) -> float:
        account = self._accounts.get(owner)
        share = self._shares.get(owner, self._default) if account is None else account.share
        has = 0.0 if account is None else account.size
        return math.inf if share.quota_bytes is None else max(0.0, share.quota_bytes - has)

    def over_quota(self) -> Collection[str]:
        return self._over_quota.keys()

    def reserved(self, size: float) -> int:
        return sum(math.ceil(share.floor_bytes / size) for share in self._shares.values())

    def guaranteed(self, owner: str, size: float) -> int:
        return int(self._shares.get(owner, self._default).floor_bytes // size)

    def evict_surplus(self) -> list[K]:
        """Each owner above its quota loses its own first."""
        keys = []
        for owner in list(self._over_quota):
            while owner in self._over_quota:
                keys.append(self._evict_from(owner))
        return keys

    def discard(self, key: K) -> None:
        owner, _ = self._entries[key]
        self._accounts[owner].policy.discard(key)
        self._released -= 1
        self._strike(key)

    def forget(self, key: K) -> None:
        owner, _ = self._entries[key]
        self._accounts[owner].policy.forget(key)
        self._strike(key)

    def retain(self, keys: Iterable[K], until: float) -> int:
        known = [key for key in keys if key in self._entries]
        return sum(self._accounts[owner].policy.retain(some, until) for owner, some in self._by_owner(known))

    def unretain(self, keys: Iterable[K]) -> None:
        for owner, some in self._by_owner([key for key in keys if key in self._entries]):
            self._accounts[owner].policy.unretain(some)

    def expire(self, now: float) -> None:
        for account in self._accounts.values():
            account.policy.expire(now)

    def _by_owner(self, keys: Iterable[K]) -> Iterator[tuple[str, list[K]]]:
        """Runs of keys that have one owner, in the order given."""
        entries = self._entries
        for owner, some in groupby(keys, key=lambda key: entries[key][0]):
            yield owner, list(some)

    def _evict_from(self, owner: str) -> K:
        key = self._accounts[owner].policy.evict()
        self._released -= 1
        self._strike(key)
        return key

    def _strike(self, key: K) -> None:
        owner, size = self._entries.pop(key)
        self._accounts[owner].size -= size
        self._update(owner)

    def _update(self, owner: str) -> None:
        """Rank the owner by its bytes and released keys of now."""
        account = self._accounts[owner]
        losable = account.count_losable()
        self._losable += losable - account.losable
        account.losable = losable
        if len(account.policy):
            self._order.place(owner, (-account.spare, owner))
        elif owner in self._order:
            self._order.remove(owner)
        if account.is_over_quota:
            self._over_quota[owner] = None
        else:
            self._over_quota.pop(owner, None)
