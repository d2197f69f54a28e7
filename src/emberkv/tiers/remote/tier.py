"""The remote tier: blocks in a Redis or Valkey server, which any number of processes on any machines share.

The server keeps the index. So a look-up needs a round trip, and is answered later, by `query`. Of partial blocks alone,
which are few and large, each process has an index in memory, and follows what the server says of their changes.
No method raises for a server that is hung, slow, dead, full or restarted: it is counted, the blocks count as missing,
and the breaker leaves the server alone until a probe by `refresh` is answered. docs/cache.md says what that costs.
"""

import json
import logging
import secrets
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from emberkv.core.hashing import partial_siblings_hash
from emberkv.core.loading import LookupStatus
from emberkv.core.policies.fair_shares import Share
from emberkv.errors import ConfigError, RemoteTierError
from emberkv.tiers.base import RemovalResult, StoreResult, Tier, TierEntry
from emberkv.tiers.partial import PartialIndex, PartialPlace
from emberkv.tiers.remote.server import PREFIX, BlockServer, ServerAddress
from emberkv.tiers.stats import ErrorCounts, TierStats
from emberkv.tiers.store_id import ID_BYTES, kept_id

logger = logging.getLogger(__name__)

ENTRY_BYTES = 640
"""Counted for each block beside its record: what a server keeps for its keys and its places in the index (measured with
Redis 7.0: 592 bytes)."""

PARTIAL_BYTES = 1000
"""Counted for a partial block besides, for its places in the index of these (measured with Redis 7.0: 530 to 970 bytes,
the more the fewer partial blocks follow the same block)."""

LOOKUP_SECONDS = 0.25
REFRESH_SECONDS = 0.5
DEFAULT_TTL_SECONDS = 86_400.0

_STORED_AT_ONCE = 8 * 2**20
"""Bytes given to the server in one call, during which it serves no other."""

FIRST_LOOKED_UP, MORE_LOOKED_UP = 64, 8
"""Blocks looked up in the first round trip, and by what factor the later ones ask for more: a query stops at a miss."""

_PLACE = struct.Struct("<32s32sI32s")
"""A partial block's parent, the full block before it, its tokens, and what stands for all with its parent in a removal,
as ``blocks.lua`` takes them apart."""

NOT_REACHED = "the server does not answer; they are removed when it does, unless this process is restarted before"


class RemoteTier(Tier):
    """A `Tier` in the server at ``address``, which `connect` reaches.

    max_bytes: of what all processes have stored under ``prefix``; a store by this process evicts until it holds, the
    least recently used blocks first. ttl_seconds: a block that was not used for so long is gone. shares: floors and
    quotas by owner, as in `FairShares`. draw: random bytes, for the key by which processes know the server.

    store_id is None until the server has answered, and another one after it has lost all that it had.
    """

    refresh_seconds = REFRESH_SECONDS
    is_scanned = True
    keeps_partial = True

    def __init__(
        self,
        address: ServerAddress,
        max_bytes: int,
        *,
        namespace: bytes,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        shares: Mapping[str, Share] | None = None,
        name: str = "remote",
        prefix: bytes = PREFIX,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        if max_bytes <= 0:
            raise ConfigError(f"the remote tier's size is {max_bytes} bytes; it must be above 0")
        self.name = name
        self._address = address
        self._max_bytes = max_bytes
        self._namespace = prefix + namespace
        self._draw = draw
        self._ttl_ms = max(1, round(ttl_seconds * 1000))
        self._shares = json.dumps(
            {
                owner: [share.floor_bytes, -1 if share.quota_bytes is None else share.quota_bytes]
                for owner, share in (shares or {}).items()
            },
            ensure_ascii=False,
        )
        self._errors = ErrorCounts(logger, f"{name} tier")
        self._server = BlockServer(address, sha256(namespace).digest()[:16], self._errors, prefix=prefix, clock=clock)
        self._lock = threading.Lock()  # the counters, what is to be removed, and the index of partial blocks
        self._skipped: Counter[str] = Counter()
        self._evictions = 0
        self._unremoved: set[bytes] = set()
        self._uncleared = False
        self._had_blocks = self._was_emptied = False  # of this model, by stores and refreshes
        self._last_loss: bytes | str = ""  # the number of the last loss that the server has reported
        self._lost: list[bytes] = []
        self._partial = PartialIndex()
        self._partial_owners: dict[bytes, str] = {}
        self._partial_known = 0  # the number up to which the index follows the server's; 0: it is to be read anew
        self._partial_changed = 0  # the number of the last change when it was read
        self._server_key = b""

    def connect(self) -> "RemoteTier":
        """Itself, connected where the server answers. Raises ConfigError for a server that refuses access."""
        try:
            self._call_state()
        except RemoteTierError as error:
            if error.kind == "access refused":
                raise ConfigError(
                    f"the server {self._address} of --remote-tier refuses access; check the user in the URL, and the "
                    "password in --remote-tier-password-file or EMBERKV_REMOTE_TIER_PASSWORD"
                ) from error
            logger.warning("%s tier: %s does not answer; it is used when it does", self.name, self._address)
        else:
            self._follow_partial()
        return self

    @property
    def lookup_seconds(self) -> float | None:
        return LOOKUP_SECONDS

    @property
    def removals_seen(self) -> int:
        return self._server.contents.clock

    def lookup(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        """Of full blocks nothing is known without a round trip."""
        if not self._server.breaker.is_closed:
            return 0
        for position, block_hash in enumerate(block_hashes):
            if self._partial.place(block_hash) is None or self._is_hidden(block_hash):
                return position
        return len(block_hashes)

    def partial_counts(self, parent: bytes) -> list[int]:
        return self._partial.counts(parent)

    def partial_place(self, block_hash: bytes) -> PartialPlace | None:
        return self._partial.place(block_hash)

    def partial_owner(self, block_hash: bytes) -> str | None:
        return self._partial_owners.get(block_hash)

    def status(self, block_hash: bytes, *, exact: bool = False) -> LookupStatus:
        hidden = not self._server.breaker.is_closed or self._is_hidden(block_hash)
        return LookupStatus.MISS if hidden else LookupStatus.PENDING

    def query(self, block_hashes: Sequence[bytes], *, exact: bool = False) -> int:
        start, count = 0, FIRST_LOOKED_UP
        while start < len(block_hashes) and self._server.breaker.is_closed:
            wanted = block_hashes[start : start + count]
            try:
                found = self._server.described(wanted)
            except RemoteTierError:
                return start
            for at, (block_hash, described) in enumerate(zip(wanted, found, strict=True)):
                if not described or (exact and described[:1] != b"1") or self._is_hidden(block_hash):
                    return start + at
            start, count = start + len(wanted), count * MORE_LOOKED_UP
        return start

    def scan(self, cursor: int) -> tuple[list[bytes], int | None]:
        if not self._server.breaker.is_closed:
            raise RemoteTierError(
                "the server of the remote tier: it is not asked, because it has failed", kind="circuit open"
            )
        found, following = self._server.scan(cursor)
        return [each for each in found if not self._is_hidden(each)], following or None

    def load(self, block_hashes: Sequence[bytes]) -> list[TierEntry | None]:
        missing: list[TierEntry | None] = [None] * len(block_hashes)
        if not block_hashes or not self._server.breaker.is_closed:
            return missing
        try:
            known = self._partial_known
            described, records = self._server.use(self._ttl_ms, block_hashes)
        except RemoteTierError:
            return missing
        self._discard_absent(known, [each for each, kind in zip(block_hashes, described, strict=True) if not kind])
        entries = map(self._entry, block_hashes, described, records)
        return [
            None if entry is None or self._is_hidden(entry.block_hash, entry.partial) else entry for entry in entries
        ]

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        if block_hashes and self._server.breaker.is_closed:
            self._try("use", self._ttl_ms, *block_hashes)

    def store(self, entries: Sequence[TierEntry], *, seen: int | None = None) -> StoreResult:
        known = self.removals_seen if seen is None else seen
        evicted: list[bytes] = []
        fitting = [entry for entry in entries if _size(entry) <= self._max_bytes]
        self._skip("too large", len(entries) - len(fitting))
        count = 0
        for batch in reversed(list(self._batches(fitting))):
            count += self._store(batch, known, evicted)
        self._had_blocks |= count > 0
        if any(entry.partial is not None for entry in fitting) and self._server.breaker.is_closed:
            self._follow_partial()
        return StoreResult(count, evicted)

    def remove(self, block_hashes: Sequence[bytes], *, remember: bool = True) -> RemovalResult:
        """Where the server does not answer, this process does not find them any more, and removes them when it does;
        with ``remember`` False, it leaves them.
        """
        wanted = list(dict.fromkeys(block_hashes))
        if not wanted:
            return RemovalResult()
        if not remember:
            self._forget_partial(wanted)
            return RemovalResult((self._try("drop", *wanted) if self._server.breaker.is_closed else None) or 0)
        with self._lock:
            self._unremoved.update(wanted)
        count = self._try("remove", *wanted) if self._server.breaker.is_closed else None
        if count is None:
            return RemovalResult(0, len(wanted), NOT_REACHED)
        self._removed(wanted)
        return RemovalResult(count)

    def clear(self) -> RemovalResult:
        """As `remove`, of all blocks of this model, those that other processes have stored included. Where the server
        does not answer, ``kept`` is how many it had when it last did.
        """
        with self._lock:
            self._uncleared = True
        before = self._server.contents.own_entries
        try:
            if self._server.breaker.is_closed:
                return RemovalResult(self._clear())
        except RemoteTierError:
            logger.info("%s tier: it is cleared when the server answers", self.name)
        return RemovalResult(0, before, NOT_REACHED)

    def refresh(self) -> None:
        """Forget what has expired, and follow the changes of partial blocks. Where the server has failed, try it: it is
        used again once it answers and what was to be removed is.
        """
        if not (self._server.breaker.is_closed or self._server.breaker.begin_probe()):
            return
        try:
            self._remove_left()
            changed = self._call_state()
        except RemoteTierError:
            self._partial_known = 0  # when it answers again, it may have lost some of its changes
            return
        has_blocks = self._server.contents.own_entries > 0
        self._was_emptied |= self._had_blocks and not has_blocks
        self._had_blocks = has_blocks
        if changed != self._partial_changed or not self._partial_known:
            self._follow_partial()

    def was_emptied(self) -> bool:
        """All have expired, or the server was flushed or has begun anew."""
        emptied, self._was_emptied = self._was_emptied, False
        return emptied

    def lost_blocks(self) -> list[bytes]:
        """Those that have expired since this process first reached the server, or that the server or processes of other
        models have evicted, and that were not stored again. Each process with this namespace gets all of them, if it
        refreshes within ten minutes and 20,000 losses.
        """
        lost, self._lost = self._lost, []
        return lost

    def stats(self) -> TierStats:
        contents = self._server.contents
        with self._lock:
            return TierStats(
                entries=contents.entries,
                bytes=contents.bytes,
                max_bytes=self._max_bytes,
                bytes_by_owner=contents.bytes_by_owner,
                evictions=self._evictions,
                skipped=dict(self._skipped),
                errors=dict(self._errors.counts),
                circuit=self._server.breaker.circuit,
            )

    def close(self) -> None:
        self._server.close()

    def _is_hidden(self, block_hash: bytes, place: PartialPlace | None = None) -> bool:
        """place: of a partial block; None: as the index has it."""
        unremoved = self._unremoved
        if self._uncleared or block_hash in unremoved:
            return True
        place = place or (self._partial.place(block_hash) if unremoved else None)
        return place is not None and place.is_removed_with(unremoved)

    def _entry(self, block_hash: bytes, described: bytes, record: bytes | None) -> TierEntry | None:
        if record is None or not described:
            return None
        kind, described = described[:1], described[2:]
        if kind != b"2":
            return TierEntry(block_hash, described.decode(), record, kind == b"1")
        known = _decoded(described[: _PLACE.size], described[_PLACE.size :])
        return None if known is None else TierEntry(block_hash, known[1], record, partial=known[0])

    def _batches(self, entries: Sequence[TierEntry]) -> Iterator[list[TierEntry]]:
        batch: list[TierEntry] = []
        size = 0
        for entry in entries:
            if batch and size + len(entry.data) > _STORED_AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += len(entry.data)
        if batch:
            yield batch

    def _store(self, entries: Sequence[TierEntry], seen: int, evicted: list[bytes]) -> int:
        """How many of these the server has now. Records that it has already are not sent again."""
        if not self._server.breaker.is_closed:
            self._skip("server not available", len(entries))
            return 0
        try:
            described = self._server.described([entry.block_hash for entry in entries])
            present: list[bytes] = []
            lacking: list[TierEntry] = []
            for entry, each in zip(entries, described, strict=True):
                if each and (each[:1] == b"1" or not entry.exact):
                    present.append(entry.block_hash)
                else:
                    lacking.append(entry)
            count = sum(map(bool, self._server.call("use", self._ttl_ms, *present))) if present else 0
            return count + (self._send(lacking, seen, evicted) if lacking else 0)
        except RemoteTierError as error:
            full = error.kind == "server out of memory"
            self._skip("server out of memory" if full else "server not available", len(entries))
            return 0

    def _send(self, entries: Sequence[TierEntry], seen: int, evicted: list[bytes]) -> int:
        blocks: list[object] = []
        for entry in entries:
            place = _encoded_place(entry.partial)
            blocks += [entry.block_hash, int(entry.exact), entry.owner, _size(entry), entry.data, place]
        kept, no_room, removed, others, own = self._server.call(
            "store", seen, self._max_bytes, self._ttl_ms, self._shares, *blocks
        )
        evicted += own
        self._skip("no room", no_room)
        self._skip("removed meanwhile", removed)
        with self._lock:
            self._evictions += len(own) + others
        return int(kept)

    def _call_state(self) -> int:
        """Ask the server which blocks it has lost since the last time, and which server it is. The number of the last
        change of its index of partial blocks.
        """
        arguments = self._ttl_ms, self._last_loss, self._draw(ID_BYTES)
        is_new_index, self._last_loss, lost, key, changed = self._server.call("state", *arguments)
        self._lost += lost
        self.store_id = kept_id(key, self._namespace)
        if is_new_index:
            self._errors.count("index lost")
        if key != self._server_key:  # it was emptied, say, and knows nothing of what it had
            self._partial_known, self._server_key = 0, key
        if int(changed) < self._partial_changed:  # it has begun anew with an earlier state
            self._partial_known = 0
        return int(changed)

    def _follow_partial(self) -> None:
        """Take in what has changed in the server's index of partial blocks, if the server answers."""
        try:
            self._read_partial()
        except RemoteTierError:
            self._partial_known = 0

    def _read_partial(self) -> None:
        """As `_follow_partial`. Raises RemoteTierError."""
        began, more = 0, 1  # where all is read, the last change before
        while more:
            known = self._partial_known
            forget, number, changed, more, stored, gone = self._server.call("partial", known, began)
            with self._lock:
                if forget or not known:
                    self._partial.clear()
                    self._partial_owners.clear()
                    began = int(changed)
                for block_hash in (*gone, *stored[::3]):
                    self._discard_partial(block_hash)
                for block_hash, place, owner in zip(stored[::3], stored[1::3], stored[2::3], strict=True):
                    self._add_partial(block_hash, _decoded(place, owner))
                self._partial_known, self._partial_changed = int(number), int(changed)

    def _add_partial(self, block_hash: bytes, known: tuple[PartialPlace, str] | None) -> None:
        """The caller holds the lock. known: None where the server's entry is malformed; it is not found."""
        if known is None:
            self._errors.count("malformed entry")
            return
        self._partial.add(block_hash, known[0])
        self._partial_owners[block_hash] = known[1]

    def _discard_absent(self, known: int, block_hashes: Sequence[bytes]) -> None:
        """The server, when the index followed it up to ``known``, had none of these. Unless the index was read since,
        which may have brought them.
        """
        with self._lock:
            if self._partial_known == known:
                for block_hash in block_hashes:
                    self._discard_partial(block_hash)

    def _forget_partial(self, names: Sequence[bytes]) -> None:
        with self._lock:
            for block_hash in names:
                self._discard_partial(block_hash)

    def _discard_partial(self, block_hash: bytes) -> None:
        """The caller holds the lock."""
        self._partial.discard(block_hash)
        self._partial_owners.pop(block_hash, None)

    def _removed(self, names: Sequence[bytes]) -> None:
        """The server has removed what these name."""
        with self._lock:
            for block_hash in (*names, *self._partial.removed_with(names)):
                self._discard_partial(block_hash)
            self._unremoved.difference_update(names)

    def _remove_left(self) -> None:
        with self._lock:
            left, uncleared = list(self._unremoved), self._uncleared
        if uncleared:
            self._clear()
        if left:
            self._server.call("remove", *left)
            self._removed(left)

    def _clear(self) -> int:
        number: bytes | str = ""
        cursor: bytes | int = 0
        total = 0
        while True:
            number, cursor, count = self._server.call("clear", number, cursor)
            total += int(count)
            if int(cursor) == 0:
                break
        with self._lock:
            self._partial.clear()
            self._partial_owners.clear()
            self._partial_known = 0  # what others have stored since is read again
            self._uncleared = False
        return total

    def _try(self, operation: str, *arguments: object) -> Any:
        """The result, or None, counted, where the server does not give one."""
        try:
            return self._server.call(operation, *arguments)
        except RemoteTierError:
            return None

    def _skip(self, reason: str, blocks: int) -> None:
        if blocks:
            with self._lock:
                self._skipped[reason] += blocks


def _size(entry: TierEntry) -> int:
    """What it counts in the server."""
    return len(entry.data) + ENTRY_BYTES + (PARTIAL_BYTES if entry.partial is not None else 0)


def _encoded_place(place: PartialPlace | None) -> bytes:
    if place is None:
        return b""
    return _PLACE.pack(place.parent, place.previous, place.count, partial_siblings_hash(place.parent))


def _decoded(place: bytes, owner: bytes) -> tuple[PartialPlace, str] | None:
    """What the server has of a partial block; None where it is malformed."""
    try:
        parent, previous, count, _ = _PLACE.unpack(place)
        return PartialPlace(parent, previous, count), owner.decode()
    except (struct.error, UnicodeDecodeError):
        return None
