"""The remote tier in a Mooncake store: the memory of all servers that use it, which its master shares out.

The master evicts by itself, when memory is nearly full. Keys are ``PREFIX:NAMESPACE:HASH:e`` for an exact block and
``:i`` for another one. A removal leaves a marker for `MARKED_SECONDS`, ``:gone`` in place of the last part, so that a
block that another process is just storing does not come back.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from threading import Lock
from typing import TypeVar

from emberkv.core.loading import LookupStatus
from emberkv.errors import RemoteTierError
from emberkv.tiers.base import RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.codec import MOST_BESIDE
from emberkv.tiers.remote.mooncake_client import SETUP_SECONDS, MooncakeClient
from emberkv.tiers.remote.server import ANSWER_SECONDS, ServerAddress
from emberkv.tiers.remote.tier import FIRST_LOOKED_UP, LOOKUP_SECONDS, MORE_LOOKED_UP, NOT_REACHED, REFRESH_SECONDS
from emberkv.tiers.stats import ErrorCounts, TierStats
from emberkv.tiers.store_id import master_id

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCHEME = "mooncake"
PREFIX = "emberkv:1"
MARKED_SECONDS = 30.0
"""How long a removed block is not stored again by any process, nor found."""

BUFFER_BYTES = 128 * 2**20
"""For what is read or stored: memory of the client's own, beside the part that it gives to the store. More where a
block for each thread of the tier's worker takes more."""

_THREADS = 3
"""That use the buffer at the same time: one stores, and two read."""

_AT_ONCE = 8
"""Blocks read or stored in one call at most."""

_REMOVED_AT_ONCE = 512
"""Blocks removed in one call, which has a deadline."""

_EXACT, _OTHER, _GONE = "e", "i", "gone"
_ALL = "all"
"""In place of a hash: the marker of `MooncakeTier.clear`."""


class MooncakeTier(Tier):
    """A `Tier` in the Mooncake store whose master is at ``address``, ``mooncake://HOST:PORT``.

    given_bytes: of this process's memory, which the store uses for blocks of all servers. block_bytes: of a block of
    the model. buffer_bytes: see `BUFFER_BYTES`.

    ``removals_seen`` stays 0: see the module for what keeps a removed block from being stored again. How many blocks
    there are is known to the master alone, so that the statistics leave it out.
    """

    refresh_seconds = REFRESH_SECONDS

    def __init__(
        self,
        address: ServerAddress,
        given_bytes: int,
        *,
        namespace: bytes,
        name: str = "remote",
        prefix: str = PREFIX,
        block_bytes: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
        answer_seconds: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.store_id = master_id(address.url, prefix.encode() + namespace)
        self._address = address
        self._given_bytes = given_bytes
        self._space = f"{prefix}:{sha256(namespace).hexdigest()[:32]}"
        self._clock = clock
        self._errors = ErrorCounts(logger, f"{name} tier")
        of_a_thread = max(buffer_bytes // _THREADS, block_bytes + MOST_BESIDE)
        self._at_once = min(_AT_ONCE, of_a_thread // (block_bytes + MOST_BESIDE))
        self._client = MooncakeClient(
            address,
            given_bytes,
            self._errors,
            buffer_bytes=_THREADS * of_a_thread,
            answer_seconds=answer_seconds,
            clock=clock,
        )
        self._lock = Lock()  # what follows
        self._skipped: Counter[str] = Counter()
        self._unremoved: set[bytes] = set()
        self._uncleared = False
        self._marked: dict[str, float] = {}  # markers by key, with the times at which this process takes them away

    def connect(self) -> "MooncakeTier":
        """Itself, connected where the master answers."""
        logger.warning("%s tier: Mooncake listens on all addresses of this machine, without a password", self.name)
        try:
            self._client.connect(SETUP_SECONDS)
        except RemoteTierError:
            logger.warning("%s tier: %s does not answer; it is used when it does", self.name, self._address)
        return self

    @property
    def lookup_seconds(self) -> float | None:
        return LOOKUP_SECONDS

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """Nothing is known without a round trip."""
        return 0

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        hidden = not self._client.breaker.is_closed or self._is_hidden(block_hash)
        return LookupStatus.MISS if hidden else LookupStatus.PENDING

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        wanted = (_EXACT,) if exact else (_EXACT, _OTHER)
        start, count = 0, FIRST_LOOKED_UP
        while start < len(block_hashes):
            kinds = self._kinds(block_hashes[start : start + count])
            if (run := next((at for at, kind in enumerate(kinds) if kind not in wanted), None)) is not None:
                return start + run
            start, count = start + len(kinds), count * MORE_LOOKED_UP
        return start

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        kinds = self._kinds(block_hashes)
        keys = {each: self._key(each, kind) for each, kind in zip(block_hashes, kinds, strict=True) if kind}
        found: dict[bytes, bytes] = {}
        try:
            for batch in _batches(list(keys), self._at_once):
                found |= zip(batch, self._client.get([keys[each] for each in batch]), strict=True)
        except RemoteTierError:
            pass  # counted; the rest counts as missing
        return [
            _entry(each, found.get(each, b""), exact=kind == _EXACT)
            for each, kind in zip(block_hashes, kinds, strict=True)
        ]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """To be asked for makes a block recent."""
        self._kinds(block_hashes)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        count = 0
        for batch in reversed(_batches(entries, self._at_once)):
            if not self._client.breaker.is_closed:
                self._skip("server not available", len(batch))
                continue
            try:
                count += self._store(batch)
            except RemoteTierError:
                self._skip("server not available", len(batch))
        return StoreResult(count)

    def _store(self, entries: Sequence[TierEntry]) -> int:
        """How many of these the store has now."""
        hashes = [entry.block_hash for entry in entries]
        kinds = self._asked(hashes)
        lacking = {
            self._key(entry.block_hash, _EXACT if entry.exact else _OTHER): _value(entry)
            for entry, kind in zip(entries, kinds, strict=True)
            if not kind or (kind == _OTHER and entry.exact)
        }
        if lacking and not self._client.put(lacking):
            self._skip("no room", len(lacking))
        now = self._asked(hashes) if lacking else kinds
        removed = [each for each, kind in zip(hashes, now, strict=True) if kind == _GONE]
        if removed and lacking:  # what was removed while it was being stored must not stay
            self._client.remove(self._keys(removed))
        self._skip("removed meanwhile", len(removed))
        return sum(kind in (_EXACT, _OTHER) for kind in now)

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        """Where the store does not answer, this process does not find them any more, and removes them when it does;
        with ``remember`` False, it leaves them.
        """
        wanted = list(dict.fromkeys(block_hashes))
        if not wanted:
            return RemovalResult()
        if remember:
            with self._lock:
                self._unremoved.update(wanted)
        try:
            if self._client.breaker.is_closed:
                return RemovalResult(self._remove(wanted, marked=remember))
        except RemoteTierError:
            logger.info("%s tier: %d blocks are removed when the store answers", self.name, len(wanted))
        return RemovalResult(0, len(wanted), NOT_REACHED) if remember else RemovalResult()

    def _remove(self, block_hashes: Sequence[bytes], *, marked: bool) -> int:
        count = 0
        for batch in _batches(block_hashes, _REMOVED_AT_ONCE):
            markers = [self._key(each, _GONE) for each in batch] if marked else []
            has_room = self._mark(markers)
            gone = self._client.remove(self._keys(batch))
            if not has_room:  # now there is some
                self._mark(markers)
            with self._lock:
                self._unremoved.difference_update(batch)
            count += sum(map(any, zip(gone[::2], gone[1::2], strict=True)))
        return count

    def clear(self) -> RemovalResult:
        """As `remove`, of all blocks of this model, those that other processes have stored included."""
        with self._lock:
            self._uncleared = True
        try:
            if self._client.breaker.is_closed:
                return RemovalResult(self._clear())
        except RemoteTierError:
            logger.info("%s tier: it is cleared when the store answers", self.name)
        return RemovalResult(0, 0, NOT_REACHED)

    def _clear(self) -> int:
        marker = f"{self._space}:{_ALL}:{_GONE}"
        has_room = self._mark([marker])
        count = self._client.remove_like(f"^{self._space}:[0-9a-f]+:[{_EXACT}{_OTHER}]$")
        if not has_room:
            self._mark([marker])
        with self._lock:
            self._uncleared = False
        return count

    def refresh(self) -> None:
        """Take markers away whose time is over. Where the store has failed, try it."""
        if not (self._client.breaker.is_closed or self._client.breaker.begin_probe()):
            return
        try:
            self._client.connect()
            self._client.exist([self._space])
            with self._lock:
                left, uncleared, now = list(self._unremoved), self._uncleared, self._clock()
                over = [key for key, end in self._marked.items() if end <= now]
            if uncleared:
                self._clear()
            if left:
                self._remove(left, marked=True)
            for batch in _batches(over, _REMOVED_AT_ONCE):
                self._client.remove(batch)
                with self._lock:
                    for key in batch:
                        self._marked.pop(key, None)
        except RemoteTierError:
            return

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                max_bytes=self._given_bytes,
                skipped=dict(self._skipped),
                errors=dict(self._errors.counts),
                circuit=self._client.breaker.circuit,
            )

    def close(self) -> None:
        self._client.close()

    def _mark(self, keys: Sequence[str]) -> bool:
        """Write markers that keep blocks from being stored for a while. False if the store is out of memory."""
        if not keys:
            return True
        end = self._clock() + MARKED_SECONDS
        with self._lock:
            self._marked.update(dict.fromkeys(keys, end))
        return self._client.put(dict.fromkeys(keys, b"-"))

    def _note_markers(self, keys: Sequence[str]) -> None:
        """Take these away, too, after a while: the process that left them may have ended."""
        if keys:
            end = self._clock() + 2 * MARKED_SECONDS
            with self._lock:
                for key in keys:
                    self._marked.setdefault(key, end)

    def _kinds(self, block_hashes: Sequence[bytes]) -> list[str]:
        """`_asked`, of the blocks that this process may find; "" for all where the store does not answer."""
        if not block_hashes or not self._client.breaker.is_closed:
            return [""] * len(block_hashes)
        try:
            kinds = self._asked(block_hashes)
        except RemoteTierError:
            return [""] * len(block_hashes)
        return [
            "" if kind == _GONE or self._is_hidden(each) else kind
            for each, kind in zip(block_hashes, kinds, strict=True)
        ]

    def _asked(self, block_hashes: Sequence[bytes]) -> list[str]:
        """For each block `_EXACT`, `_OTHER`, `_GONE` for one that was lately removed, or "". Raises RemoteTierError."""
        kinds = (_EXACT, _OTHER, _GONE)
        keys = [self._key(each, kind) for each in block_hashes for kind in kinds]
        cleared = f"{self._space}:{_ALL}:{_GONE}"
        *found, is_cleared = self._client.exist([*keys, cleared])
        markers = [key for key, exists in zip(keys[2::3], found[2::3], strict=True) if exists]
        self._note_markers([*markers, cleared] if is_cleared else markers)
        return [
            _GONE if is_cleared or gone else _EXACT if exact else _OTHER if other else ""
            for exact, other, gone in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]

    def _key(self, block_hash: bytes, kind: str) -> str:
        return f"{self._space}:{block_hash.hex()}:{kind}"

    def _keys(self, block_hashes: Sequence[bytes]) -> list[str]:
        """Two for each block."""
        return [self._key(each, kind) for each in block_hashes for kind in (_EXACT, _OTHER)]

    def _is_hidden(self, block_hash: bytes) -> bool:
        return self._uncleared or block_hash in self._unremoved

    def _skip(self, reason: str, blocks: int) -> None:
        if blocks:
            with self._lock:
                self._skipped[reason] += blocks


def _value(entry: TierEntry) -> bytes:
    """An entry's bytes: the length of its owner's name, the name, and the record."""
    owner = entry.owner.encode()
    return len(owner).to_bytes(2, "big") + owner + entry.data


def _entry(block_hash: bytes, value: bytes, *, exact: bool) -> TierEntry | None:
    """None for a value that cannot have been one; the record is verified by those that load it."""
    end = 2 + int.from_bytes(value[:2], "big")
    if len(value) <= end:
        return None
    try:
        return TierEntry(block_hash, value[2:end].decode(), value[end:], exact)
    except UnicodeDecodeError:
        return None


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]
