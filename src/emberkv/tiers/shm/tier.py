"""The shared-memory tier: blocks in an arena in ``/dev/shm``, which the processes of one machine and user share.

Each process keeps an index in memory, and follows the changes of the others at each `refresh`, so a look-up is as fast
as the RAM tier's. A block that has gone since is a miss. Every process stores and removes, under a lock.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from emberkv.core.policies.eviction import LRU, EntryCost
from emberkv.errors import ConfigError, UntrustedPathError
from emberkv.tiers.base import PolicyFactory, RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.partial import PartialIndex, PartialPlace
from emberkv.tiers.shm.arena import ALL, MAX_OWNER_BYTES, VERSION, Arena, Slot, check_room, remove_unused
from emberkv.tiers.stats import ErrorCounts, TierStats
from emberkv.tiers.store_id import folder_id

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")  # noqa: S108 - only files of this user alone are opened, and none through a link
OPTION = "--shm-tier"
REFRESH_SECONDS = 0.2
LOCK_SECONDS = 0.25
"""How long a change waits for another process to give the lock back."""

LOCKED = "another process does not give the lock back; they are removed when it does"

_SECOND_LOOKS = 64
"""Blocks that an eviction spares at most because another process has used them."""


@dataclass(slots=True)
class _Held:
    """A slot of the arena as this process knows it. used: as `Slot.used`, when this process last looked."""

    number: int
    slot: Slot
    used: int


class ShmTier(Tier):
    """A `Tier` in an arena of this user, made by `open`.

    Slots have the size of the first full block that is stored; before that no partial blocks are stored, whose records
    are smaller.

    max_bytes: of the arena, where this process is the first one that stores; else the arena's own size holds. Memory is
    taken as slots are filled, and given back when the last process closes the tier.
    """

    refresh_seconds = REFRESH_SECONDS
    keeps_partial = True

    def __init__(self, path: Path, max_bytes: int, *, digest: bytes, policy: PolicyFactory, name: str) -> None:
        self.name = name
        self.store_id = folder_id(path.parent, digest, path.name)
        self._path = path
        self._max_bytes = max_bytes
        self._digest = digest
        self._writing = threading.Lock()  # of this process's threads; the arena has one of the processes
        self._lock = threading.Lock()  # what follows
        self._arena: Arena | None = None
        self._policy = policy()
        self._index: dict[bytes, _Held] = {}
        self._by_number: dict[int, _Held] = {}
        self._partial = PartialIndex()
        self._free: set[int] = set()
        self._changes = 0
        self._owners: Counter[str] = Counter()
        self._evictions = 0
        self._skipped: Counter[str] = Counter()
        self._errors = ErrorCounts(logger, f"{name} tier")
        self._unremoved: set[bytes] = set()
        self._uncleared = False
        self._closed = False

    @classmethod
    def open(
        cls,
        max_bytes: int,
        *,
        namespace: bytes,
        policy: PolicyFactory = LRU,
        name: str = "shm",
        folder: Path = FOLDER,
    ) -> "ShmTier":
        """Take part in this namespace's arena, which is made by the first store where there is none.

        Raises ConfigError for a size that cannot work, and for an arena that is not this user's alone.
        """
        if max_bytes <= 0:
            raise ConfigError(f"the shared-memory tier's size is {max_bytes} bytes; it must be above 0")
        digest = sha256(namespace).digest()
        mine = f"emberkv-{os.geteuid()}-"
        path = folder / f"{mine}{VERSION}-{digest.hex()[:32]}"
        remove_unused(folder, f"{mine}*", keep=path)
        tier = cls(path, max_bytes, digest=digest, policy=policy, name=name)
        try:
            found = Arena.attach(path, digest)
        except (UntrustedPathError, OSError) as error:
            raise ConfigError(f"{OPTION} cannot be used: {error}") from error
        if found is None:
            check_room(folder, max_bytes, OPTION)
        else:
            tier._take_part(found)
        return tier

    @property
    def removals_seen(self) -> int:
        arena = self._arena
        return 0 if arena is None else arena.removals

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        if self._uncleared:
            return 0
        for position, block_hash in enumerate(block_hashes):
            held = self._index.get(block_hash)
            if held is None or (exact and not held.slot.exact) or self._is_unremoved(held):
                return position
        return len(block_hashes)

    def _is_unremoved(self, held: _Held) -> bool:
        """Whether it is to be removed, or goes with what is."""
        unremoved, place = self._unremoved, held.slot.partial
        return bool(unremoved) and (
            held.slot.block_hash in unremoved or (place is not None and place.is_removed_with(unremoved))
        )

    def block_hashes(self) -> list[bytes]:
        return [block_hash for block_hash, held in list(self._index.items()) if held.slot.partial is None]

    def partial_counts(self, parent: bytes) -> list[int]:
        return self._partial.counts(parent)

    def partial_place(self, block_hash: bytes) -> PartialPlace | None:
        return self._partial.place(block_hash)

    def partial_owner(self, block_hash: bytes) -> str | None:
        held = self._index.get(block_hash)
        return None if held is None else held.slot.owner

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        self.touch(block_hashes)
        return [self._load(block_hash) for block_hash in block_hashes]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        stamp = time.monotonic_ns()
        with self._lock:
            if self._arena is None:
                return
            found = [block_hash for block_hash in block_hashes if block_hash in self._index]
            for at, block_hash in enumerate(found):
                held = self._index[block_hash]
                held.used = stamp - at
                self._arena.use(held.number, held.used)
            self._policy.access(reversed(found))

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        if self._arena is None and self._made(entries) is None:
            return StoreResult()
        evicted: list[bytes] = []
        with self._changing() as arena:
            if arena is None:
                self._skip("another process writes", len(entries))
                return StoreResult()
            removed = arena.removed_since(arena.removals if seen is None else seen)
            with self._lock:
                self._follow(arena)
            count = 0
            for entry in reversed(entries):
                if entry.block_hash not in self._index and any(map(removed, _names_of(entry))):
                    self._skip("removed meanwhile", 1)
                    continue
                with self._lock:
                    count += self._store_one(arena, entry, evicted)
        return StoreResult(count, [block_hash for block_hash in evicted if block_hash not in self._index])

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        """Where another process does not give the lock back, this one does not find the blocks any more, and removes
        them when it has the lock; with ``remember`` False, it leaves them.
        """
        if not remember:
            return self._drop(block_hashes)
        with self._lock:
            self._unremoved.update(block_hashes)
        return self._remove()

    def clear(self) -> RemovalResult:
        """As `remove`, of all blocks of this model."""
        self._uncleared = True
        return self._remove()

    def refresh(self) -> None:
        """Take in what other processes have changed; where nothing has, this costs one look into the header."""
        try:
            arena = self._arena or self._attached()
        except (UntrustedPathError, OSError) as error:
            self._errors.count("arena not opened", type(error).__name__)
            return
        if arena is not None and arena.changes != self._changes:
            with self._lock:
                self._follow(arena)
        if self._uncleared or self._unremoved:
            self._remove()

    def stats(self) -> TierStats:
        with self._lock:
            arena, count = self._arena, len(self._index)
            size = 0 if arena is None else arena.slot_bytes
            return TierStats(
                entries=count,
                bytes=count * size,
                max_bytes=self._max_bytes if arena is None else arena.slots * size,
                bytes_by_owner={owner: blocks * size for owner, blocks in self._owners.items() if blocks},
                evictions=self._evictions,
                skipped=dict(self._skipped),
                errors=dict(self._errors.counts),
            )

    def close(self) -> None:
        with self._writing, self._lock:
            self._closed = True
            arena, self._arena = self._arena, None
            self._index, self._by_number = {}, {}
            self._partial.clear()
            if arena is not None:
                arena.close()

    @contextmanager
    def _changing(self) -> Iterator[Arena | None]:
        """The arena, to change; None where another process does not give the lock back, or the tier is closed."""
        with self._writing:
            if self._arena is None:
                yield None
                return
            with self._arena.writing(LOCK_SECONDS) as held:
                yield self._arena if held else None

    def _attached(self) -> Arena | None:
        with self._writing:
            if self._arena is None and not self._closed and (arena := Arena.attach(self._path, self._digest)):
                self._take_part(arena)
            return self._arena

    def _made(self, entries: Sequence[TierEntry]) -> Arena | None:
        """The arena, with slots for records such as these."""
        if not entries:
            return None
        full = [len(entry.data) for entry in entries if entry.partial is None]
        if not full:
            self._skip("no arena yet", len(entries))
            return None
        largest = max(full)
        with self._writing:
            if self._arena is not None or self._closed:
                return self._arena
            try:
                arena = Arena.create(self._path, self._digest, largest, self._max_bytes)
            except (UntrustedPathError, OSError) as error:
                self._errors.count("arena not made", type(error).__name__)
                self._skip("no arena", len(entries))
                return None
            if arena is None:
                self._skip("too large", len(entries))
            else:
                self._take_part(arena)
            return arena

    def _take_part(self, arena: Arena) -> None:
        with self._lock:
            self._arena = arena
            self._free = set(range(arena.slots))
            self._changes = arena.changes
            found = [(slot.used, number, slot) for number in range(arena.slots) if (slot := arena.slot(number))]
            for used, number, slot in sorted(found, key=lambda each: each[:2]):
                self._enter(_Held(number, slot, used))
        total = arena.slots * arena.slot_bytes
        logger.info(
            "%s tier: %s slots of %s bytes, %s in use",
            self.name,
            f"{arena.slots:,}",
            f"{arena.slot_bytes:,}",
            len(found),
        )
        if total + arena.slot_bytes <= self._max_bytes or total > self._max_bytes:
            logger.warning(
                "%s tier: %s is %s bytes; the process that was first has made it of %s, which holds",
                self.name, OPTION, f"{self._max_bytes:,}", f"{total:,}",
            )  # fmt: skip

    def _follow(self, arena: Arena) -> None:
        changed, self._changes = arena.changed_slots(self._changes)
        for number in changed:
            if (held := self._by_number.get(number)) is not None:
                self._discard(held)
            if (slot := arena.slot(number)) is not None:
                self._enter(_Held(number, slot, slot.used))

    def _enter(self, held: _Held) -> None:
        key = held.slot.block_hash
        if key in self._index:  # in another slot, whose change is still to be taken in
            self._discard(self._index[key])
        self._free.discard(held.number)
        self._index[key] = self._by_number[held.number] = held
        self._owners[held.slot.owner] += 1
        if held.slot.partial is not None:
            self._partial.add(key, held.slot.partial)
        self._admit(held)

    def _admit(self, held: _Held) -> None:
        assert self._arena is not None
        self._policy.admit(held.slot.block_hash, EntryCost(size=self._arena.slot_bytes, owner=held.slot.owner))
        self._policy.release((held.slot.block_hash,))

    def _discard(self, held: _Held) -> None:
        self._policy.discard(held.slot.block_hash)
        self._strike(held)

    def _strike(self, held: _Held) -> None:
        """Take it out of the index; the policy does not have it any more."""
        del self._index[held.slot.block_hash], self._by_number[held.number]
        self._owners[held.slot.owner] -= 1
        self._free.add(held.number)
        self._partial.discard(held.slot.block_hash)

    def _load(self, block_hash: bytes) -> TierEntry | None:
        held, arena = self._index.get(block_hash), self._arena
        if held is None or arena is None or self._uncleared or self._is_unremoved(held):
            return None
        found = arena.read(held.number, block_hash)
        if found is None:
            return None
        slot, data = found
        return TierEntry(block_hash, slot.owner, data, slot.exact, slot.partial)

    def _store_one(self, arena: Arena, entry: TierEntry, evicted: list[bytes]) -> bool:
        there = self._index.get(entry.block_hash)
        if there is not None and (there.slot.exact or not entry.exact):
            there.used = time.monotonic_ns()
            arena.use(there.number, there.used)
            self._policy.access((entry.block_hash,))
            return True
        refusal = "too large" if len(entry.data) > arena.slot_bytes else ""
        refusal = refusal or ("owner's name too long" if len(entry.owner.encode()) > MAX_OWNER_BYTES else "")
        if refusal:
            self._skipped[refusal] += 1
            return False
        if there is not None:
            self._discard(there)
            self._free.discard(there.number)
            number: int | None = there.number
        else:
            number = self._taken(arena, entry.owner, evicted)
        if number is None:
            self._skipped["no room"] += 1
            return False
        stamp = time.monotonic_ns()
        slot = Slot(entry.block_hash, entry.owner, len(entry.data), entry.exact, stamp, entry.partial)
        try:
            arena.write(number, slot, entry.data)
        except OSError as error:
            self._skipped["no memory"] += 1
            self._errors.count("no memory", type(error).__name__)
            self._free.add(number)
            return False
        self._enter(_Held(number, slot, slot.used))
        for key in self._policy.evict_surplus():
            self._evict(arena, self._index[key], evicted)
        self._changes = arena.changes
        return entry.block_hash in self._index

    def _taken(self, arena: Arena, owner: str, evicted: list[bytes]) -> int | None:
        """A slot for a block of ``owner``; None where all that could be evicted is guaranteed to others."""
        if not self._free:
            if not self._policy.available_to(owner):
                return None
            self._evict(arena, self._victim(arena, owner), evicted)
        return self._free.pop()

    def _victim(self, arena: Arena, owner: str) -> _Held:
        """The block to evict: the policy's choice, unless another process has used that since it was looked at."""
        for _ in range(_SECOND_LOOKS):
            held = self._index[self._policy.evict_for(owner)]
            used = arena.used(held.number)
            if used <= held.used:
                return held
            held.used = used
            self._admit(held)
        return self._index[self._policy.evict_for(owner)]

    def _evict(self, arena: Arena, held: _Held, evicted: list[bytes]) -> None:
        arena.erase(held.number)
        self._strike(held)
        self._evictions += 1
        if held.slot.partial is None:
            evicted.append(held.slot.block_hash)

    def _remove(self) -> RemovalResult:
        """Remove what is to be removed."""
        with self._lock:
            wanted, everything, arena = set(self._unremoved), self._uncleared, self._arena
        if arena is None:
            with self._lock:
                self._unremoved, self._uncleared = set(), False
            return RemovalResult()
        with self._changing() as arena:
            if arena is None:
                return RemovalResult(0, len(self._index) if everything else len(wanted), LOCKED)
            with self._lock:
                self._follow(arena)
                arena.note_removals([ALL] if everything else wanted)
                with_them = () if everything else self._partial.removed_with(wanted)
                gone = [each for each in self._index.values() if everything or each.slot.block_hash in wanted]
                gone += [self._index[each] for each in with_them if each not in wanted]
                self._erase(arena, gone)
                self._unremoved -= wanted
                self._uncleared = self._uncleared and not everything
        return RemovalResult(_count_full(gone))

    def _drop(self, block_hashes: Sequence[bytes]) -> RemovalResult:
        """Remove these, of which the stores by other processes are not refused."""
        with self._changing() as arena:
            if arena is None:
                return RemovalResult(0, len(block_hashes), LOCKED)
            with self._lock:
                self._follow(arena)
                gone = [held for each in dict.fromkeys(block_hashes) if (held := self._index.get(each)) is not None]
                self._erase(arena, gone)
        return RemovalResult(_count_full(gone))

    def _erase(self, arena: Arena, gone: Sequence[_Held]) -> None:
        for held in gone:
            arena.erase(held.number)
            self._discard(held)
        self._changes = arena.changes

    def _skip(self, reason: str, blocks: int) -> None:
        with self._lock:
            self._skipped[reason] += blocks


def _names_of(entry: TierEntry) -> list[bytes]:
    """What removes a block."""
    return [entry.block_hash, *(entry.partial.removed_by() if entry.partial is not None else ())]


def _count_full(held: Sequence[_Held]) -> int:
    return sum(each.slot.partial is None for each in held)
