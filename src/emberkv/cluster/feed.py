"""Follows what replicas have cached: events and snapshots of their pools, as far as these arrive, into a block index.

batch  ──> applied, if it continues what is known; else it shows that events are missing
need() ──> what to ask the replica for: events again, or the next chunk of a snapshot
chunk  ──> merged, and the events after it applied again
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.policies import Decision, ReplicaState, RoutingReason
from emberkv.cluster.routing import Router, RoutingRequest
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import Event
from emberkv.core.feed import CacheFeed, EventBatch, EventsLost, FeedMessage, SnapshotChunk

PAST_EPOCHS = 64
"""Epochs that a reader remembers having left, so that a late message of one is not taken for a restart."""

MAX_RECENT_EVENTS = 100_000
"""Events kept while a snapshot is read; with more, it begins again."""


class FeedIndex(Protocol):
    """What a reader keeps up to date. To store what is there, or to remove what is not, changes nothing."""

    def apply(self, event: Event) -> None: ...

    def merge(self, chunk: SnapshotChunk) -> None:
        """Add the chunk's blocks."""
        ...

    def clear(self) -> None:
        """A snapshot follows, of all that the process has."""
        ...

    def restart(self) -> None:
        """The process is another one, which will report all blocks that it has."""
        ...


@dataclass(frozen=True, slots=True)
class NeedEvents:
    """Ask for the events after this number (`CacheFeed.events`)."""

    after: int


@dataclass(frozen=True, slots=True)
class NeedChunk:
    """Ask for the snapshot's chunk at this cursor (`CacheFeed.snapshot`)."""

    cursor: str


class FeedReader:
    """Follows one pool through messages that may be lost, repeated, late or out of order, and across its restarts.

    While `exact`, the index has what the pool had after event ``sequence`` of ``epoch``, and no later event is known
    of. Otherwise it is an estimate, and `need` says what to ask the pool's process for. Messages that answer nothing
    that is needed are ignored.

        reader = FeedReader(index)
        while (need := reader.need()) is not None:
            reader.take(feed.snapshot(need.cursor) if isinstance(need, NeedChunk) else feed.events(need.after))
    """

    def __init__(self, index: FeedIndex) -> None:
        self.epoch = b""
        self.sequence = 0
        self._index = index
        self._known = 0  # the last event of the epoch that is known of
        self._complete = False  # the index has what the pool had after event `sequence`
        self._wants_snapshot = True
        self._cursor: str | None = None  # of the chunk that comes next
        self._recent: deque[tuple[int, Event]] = deque()  # since the last chunk; only while a snapshot is read
        self._past: deque[bytes] = deque(maxlen=PAST_EPOCHS)

    @property
    def exact(self) -> bool:
        """Whether nothing is known to be missing; a reader that is not exact is degraded."""
        return self._complete and self.sequence >= self._known

    def need(self) -> NeedEvents | NeedChunk | None:
        """What to ask for next; None while the index is exact."""
        if self._wants_snapshot:
            return NeedChunk("")
        if self.sequence < self._known:
            return NeedEvents(self.sequence)
        return NeedChunk(self._cursor or "") if not self._complete else None

    def begin(self, epoch: bytes, last: int) -> None:
        """The process is in this epoch, whose last event was number ``last`` when it was asked. In an epoch that is not
        known here, a snapshot says what these events have come to: none up to ``last`` is wanted.
        """
        if epoch in self._past or epoch == self.epoch:
            return
        self._begin_epoch(epoch)
        self.sequence = self._known = last
        self._wants_snapshot = last > 0
        self._complete = last == 0

    def take(self, message: FeedMessage) -> None:
        """Take in a message, whenever it comes."""
        if message.epoch in self._past:
            return
        if message.epoch != self.epoch:
            self._begin_epoch(message.epoch)
        match message:
            case EventBatch():
                self._take_batch(message)
            case EventsLost():
                self._take_loss(message)
            case SnapshotChunk():
                self._take_chunk(message)

    def _begin_epoch(self, epoch: bytes) -> None:
        """A process has started, with an empty pool, or it is heard of for the first time."""
        if self.epoch:
            self._past.append(self.epoch)
        self.epoch = epoch
        self.sequence = self._known = 0
        self._index.restart()
        self._complete, self._wants_snapshot = True, False
        self._cursor = None
        self._recent.clear()

    def _take_batch(self, batch: EventBatch) -> None:
        self._known = max(self._known, batch.last)
        if batch.first > self.sequence + 1 or batch.last <= self.sequence:
            return
        events = batch.events[self.sequence + 1 - batch.first :] if batch.first <= self.sequence else batch.events
        for event in events:
            self._index.apply(event)
        if not self._complete and not self._wants_snapshot:  # a new snapshot needs none of those before it
            self._recent.extend(enumerate(events, self.sequence + 1))
            if len(self._recent) > MAX_RECENT_EVENTS:
                self._wants_snapshot = True
                self._recent.clear()
        self.sequence = batch.last
        if self.exact:
            self._wants_snapshot = False

    def _take_loss(self, loss: EventsLost) -> None:
        self._known = max(self._known, loss.last)
        if self.sequence + 1 < loss.oldest:
            self._wants_snapshot = True

    def _take_chunk(self, chunk: SnapshotChunk) -> None:
        begins = chunk.cursor == ""
        is_new = not self.sequence and not self._known and self._complete  # the epoch has just begun here
        wanted = self._wants_snapshot or not self._complete or is_new if begins else chunk.cursor == self._cursor
        if not wanted or (not begins and (self._complete or self._wants_snapshot)):
            return
        self._known = max(self._known, chunk.sequence)
        if begins:
            self._index.clear()
            self._recent.clear()
            self._complete = self._wants_snapshot = False
            self.sequence = chunk.sequence
        self._merge(chunk)

    def _merge(self, chunk: SnapshotChunk) -> None:
        """Add the blocks that were there at event ``chunk.sequence``, and apply again what came after it.

        Events before it that are not here yet do no harm later: the last one of a block says what the chunk says.
        """
        self._index.merge(chunk)
        while self._recent and self._recent[0][0] <= chunk.sequence:
            self._recent.popleft()
        for _, event in self._recent:
            self._index.apply(event)
        self._cursor = chunk.next_cursor
        if chunk.next_cursor is None:
            self._complete = True
            self._recent.clear()


class ReplicaBlocks:
    """One replica's part of a block index: the blocks of its pool and of the tiers below it.

    An epoch begins with nothing in any tier: what a tier has kept over a restart comes in a snapshot. The blocks of a
    tier that others share (`BlockIndex.share`) stay, unless ``unkept`` names it: the shared tiers whose blocks the
    replica would tell of when it starts, and of which nothing else is known to have kept them. A snapshot replaces what
    is known of the shared tiers that ``listed`` names, too: those whose whole content it lists, whichever replica has
    stored it. on_snapshot: is called when a snapshot begins, after which no event before it is applied any more.
    """

    def __init__(
        self,
        index: BlockIndex,
        replica: int,
        *,
        unkept: Callable[[], Iterable[str]] = tuple,
        listed: Callable[[], Iterable[str]] = tuple,
        on_snapshot: Callable[[], None] = lambda: None,
    ) -> None:
        self._index = index
        self._replica = replica
        self._unkept = unkept
        self._listed = listed
        self._on_snapshot = on_snapshot

    def apply(self, event: Event) -> None:
        self._index.apply(self._replica, event)

    def merge(self, chunk: SnapshotChunk) -> None:
        self._index.add(self._replica, chunk.block_hashes, chunk.tier)

    def clear(self) -> None:
        self._forget(self._listed())
        self._on_snapshot()

    def restart(self) -> None:
        self._forget(self._unkept())

    def _forget(self, shared: Iterable[str]) -> None:
        self._index.forget(self._replica)
        for tier in shared:
            self._index.clear(self._replica, tier)


class RoutedReplicas:
    """Replicas in this process: asks a router where a request goes, and keeps the router's index as recent as their
    pools are. One replica alone needs no index.

    states: by slot, of the replicas that have joined the router.
    """

    def __init__(self, router: Router, states: Sequence[ReplicaState]) -> None:
        self._router = router
        self._states = states
        self._index = router.index if len(states) > 1 else None
        self._readers = [self._reader(replica) for replica in range(len(states))]

    @property
    def follows_pools(self) -> bool:
        """Whether `publish` has anything to do: the router has an index, and more than one replica to choose from."""
        return self._index is not None

    def decide(self, request: RoutingRequest) -> Decision | None:
        """Where a request goes; None while no replica is up."""
        if len(self._states) == 1:
            return Decision(0, RoutingReason.ONLY) if self._states[0].up else None
        return self._router.decide(request, self._states)

    def publish(self, replica: int, pool: BlockPool) -> None:
        """Hand on what has changed in a replica's pool since the last time."""
        reader, log = self._readers[replica], pool.events
        if reader is None or log.last_sequence == reader.sequence:
            return
        events = log.since(reader.sequence)
        if events is not None:
            reader.take(EventBatch(log.epoch, reader.sequence + 1, events))
            return
        feed = CacheFeed(pool)
        reader.take(feed.events(reader.sequence))
        reader.take(feed.snapshot(limit=pool.num_blocks + 1))

    def lost(self, replica: int) -> None:
        """A replica's pool is gone; the next one begins empty."""
        self._router.lost(replica)
        self._readers[replica] = self._reader(replica)

    def _reader(self, replica: int) -> FeedReader | None:
        return FeedReader(ReplicaBlocks(self._index, replica)) if self._index is not None else None
