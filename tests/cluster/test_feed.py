"""A reader knows what a pool has, or knows that it does not, whatever becomes of the messages between them."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberkv.cluster.feed import MAX_RECENT_EVENTS, FeedReader, NeedChunk, NeedEvents
from emberkv.core.block import Block
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventLog
from emberkv.core.feed import CacheFeed, EventBatch, EventsLost, FeedMessage, SnapshotChunk
from emberkv.event_wire import decode, encode
from tests.core.harness import chain, store


class Mirrored:
    """A set of block hashes, as a `FeedIndex`."""

    def __init__(self) -> None:
        self.hashes: set[bytes] = set()

    def apply(self, event: Event) -> None:
        match event:
            case BlockStored():
                self.hashes |= set(event.block_hashes)
            case BlockRemoved():
                self.hashes -= set(event.block_hashes)
            case AllBlocksCleared():
                self.hashes.clear()

    def merge(self, chunk: SnapshotChunk) -> None:
        self.hashes |= set(chunk.block_hashes)

    def clear(self) -> None:
        self.hashes.clear()

    def restart(self) -> None:
        self.hashes.clear()


class Worker:
    """A process with a pool of six blocks of a token. history: what the pool had, by epoch and event."""

    def __init__(self) -> None:
        self.history: dict[tuple[bytes, int], set[bytes]] = {}
        self._starts = 0
        self.restart()

    def restart(self) -> None:
        self._starts += 1
        self.pool = BlockPool(6, 1, events=EventLog(12, epoch=b"epoch %d" % self._starts))
        self.feed = CacheFeed(self.pool)
        self._held: list[list[Block]] = []
        self._recorded = Mirrored()
        self._seen = self._published = 0
        self._record()

    def change(self, verb: str, number: int) -> None:
        tokens = chain([int(digit) for digit in f"{number:06b}"[: 1 + number % 5]], block_size=1)
        if verb == "store" and self.pool.num_free >= len(tokens):
            self._held.append(store(self.pool, tokens, exact=bool(number % 2)))
        elif verb == "free" and self._held:
            self.pool.free(self._held.pop(number % len(self._held)))
        elif verb == "remove":
            self.pool.remove(tokens.block_hashes)
        elif verb == "clear" and number < 8:
            self.pool.clear()
        self._record()

    def _record(self) -> None:
        log = self.pool.events
        events = log.since(self._seen)
        assert events is not None
        self.history[log.epoch, self._seen] = set(self._recorded.hashes)
        for event in events:
            self._recorded.apply(event)
            self._seen += 1
            self.history[log.epoch, self._seen] = set(self._recorded.hashes)
        assert self._recorded.hashes == set(self.pool.snapshot().parents)

    def publish(self) -> FeedMessage:
        """What a subscriber gets: the events since the last time, or only where they end."""
        message = self.feed.events(self._published, limit=4)
        if isinstance(message, EventsLost):
            message = self.feed.events(self.pool.events.last_sequence)
            assert isinstance(message, EventBatch)
        self._published = message.last
        return message

    def answer(self, reader: FeedReader) -> FeedMessage | None:
        match reader.need():
            case NeedEvents(after=after):
                return self.feed.events(after, limit=3)
            case NeedChunk(cursor=cursor):
                return self.feed.snapshot(cursor, limit=2)
            case None:
                return None


VERBS = ["store", "store", "store", "free", "remove", "clear", "publish", "publish", "ask", "ask", "ask", "deliver",
         "deliver", "deliver", "repeat", "lose", "restart"]  # fmt: skip
ACTIONS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 63)), max_size=80)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(actions=ACTIONS)
def test_while_a_reader_says_exact_it_is_and_it_always_recovers(actions: list[tuple[str, int]]) -> None:
    worker, index, on_the_way = Worker(), Mirrored(), list[bytes]()
    reader = FeedReader(index)

    def take(data: bytes) -> None:
        reader.take(decode(data))
        if reader.exact:
            assert index.hashes == worker.history[reader.epoch, reader.sequence]

    for verb, number in actions:
        at = number % len(on_the_way) if on_the_way else 0
        if verb == "publish":
            on_the_way.append(encode(worker.publish()))
        elif verb == "ask" and (answer := worker.answer(reader)) is not None:
            on_the_way.append(encode(answer))
        elif verb == "deliver" and on_the_way:
            take(on_the_way.pop(at))
        elif verb == "repeat" and on_the_way:
            take(on_the_way[at])
        elif verb == "lose" and on_the_way:
            del on_the_way[at]
        elif verb == "restart" and number < 16:
            worker.restart()
        elif verb in ("store", "free", "remove", "clear"):
            worker.change(verb, number)
    take(encode(worker.feed.events(worker.pool.events.last_sequence)))
    for _ in range(30):
        if (answer := worker.answer(reader)) is not None:
            take(encode(answer))
    assert reader.exact
    assert (reader.epoch, reader.sequence) == (worker.pool.events.epoch, worker.pool.events.last_sequence)
    assert index.hashes == set(worker.pool.snapshot().parents)


def removed(number: int) -> BlockRemoved:
    return BlockRemoved((bytes([number]) * 32,))


def batch(first: int, count: int = 1, epoch: bytes = b"a") -> EventBatch:
    return EventBatch(epoch, first, [removed(first + at) for at in range(count)])


@pytest.fixture
def reader() -> FeedReader:
    """Exact, after event 2 of epoch "a"."""
    reader = FeedReader(Mirrored())
    assert (reader.exact, reader.need()) == (False, NeedChunk(""))
    reader.take(batch(1, 2))
    assert (reader.exact, reader.need(), reader.sequence) == (True, None, 2)
    return reader


def test_a_gap_is_noticed_and_mended_by_the_events_themselves(reader: FeedReader) -> None:
    reader.take(batch(4))
    assert (reader.exact, reader.need()) == (False, NeedEvents(2))
    reader.take(batch(3))
    assert (reader.exact, reader.need()) == (False, NeedEvents(3))
    reader.take(batch(2, 3))
    assert (reader.exact, reader.sequence) == (True, 4)


def test_a_batch_without_events_shows_a_gap(reader: FeedReader) -> None:
    reader.take(EventBatch(b"a", 3, []))
    assert reader.exact
    reader.take(EventBatch(b"a", 9, []))
    assert reader.need() == NeedEvents(2)


def test_where_events_are_lost_a_snapshot_is_needed(reader: FeedReader) -> None:
    reader.take(EventsLost(b"a", 7, 9))
    assert (reader.exact, reader.need()) == (False, NeedChunk(""))
    reader.take(SnapshotChunk(b"a", 9, "", None, 4, (), ()))
    assert (reader.exact, reader.sequence) == (True, 9)


def test_another_epoch_is_a_restart_and_what_comes_late_of_the_old_one_is_ignored(reader: FeedReader) -> None:
    reader.take(batch(1, epoch=b"b"))
    assert (reader.exact, reader.epoch, reader.sequence) == (True, b"b", 1)
    reader.take(batch(3, epoch=b"a"))
    assert (reader.exact, reader.epoch, reader.sequence) == (True, b"b", 1)
    reader.take(batch(5, epoch=b"c"))
    assert (reader.exact, reader.need()) == (False, NeedEvents(0))


def test_a_snapshot_begins_again_where_too_much_happens_meanwhile() -> None:
    reader = FeedReader(Mirrored())
    reader.take(SnapshotChunk(b"a", 5, "", "1.2", 4, (), ()))
    assert reader.need() == NeedChunk("1.2")
    reader.take(EventBatch(b"a", 6, [removed(0)] * (MAX_RECENT_EVENTS + 1)))
    assert reader.need() == NeedChunk("")


@pytest.mark.parametrize("late", [True, False])
def test_a_block_that_was_removed_while_its_chunk_was_on_the_way_stays_removed(late: bool) -> None:
    index = Mirrored()
    reader = FeedReader(index)
    block = removed(6).block_hashes[0]
    reader.take(SnapshotChunk(b"a", 5, "", "1.1", 4, (), ()))
    chunk = SnapshotChunk(b"a", 5, "1.1", None, 4, (block,), (block,))
    messages: list[FeedMessage] = [EventBatch(b"a", 6, [BlockRemoved((block,))]), chunk]
    for message in messages if late else reversed(messages):
        reader.take(message)
    assert (reader.exact, index.hashes) == (True, set())


ANSWERS: list[Callable[[], FeedMessage]] = [
    lambda: batch(1, 2),
    lambda: SnapshotChunk(b"a", 0, "", None, 4, (bytes(32),), (bytes(32),)),
    lambda: SnapshotChunk(b"a", 9, "1.5", None, 4, (bytes(32),), (bytes(32),)),
    lambda: EventsLost(b"a", 2, 2),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_to_nothing_that_is_needed_changes_nothing(
    reader: FeedReader, answer: Callable[[], FeedMessage]
) -> None:
    reader.take(answer())
    assert (reader.exact, reader.sequence, reader.need()) == (True, 2, None)
