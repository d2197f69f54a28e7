"""A store that processes share counts for each of them, whatever becomes of their messages and of the processes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

import pytest

from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.feed import FeedReader, NeedChunk, NeedEvents, ReplicaBlocks
from emberkv.core.block_pool import BlockPool
from emberkv.core.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventLog
from emberkv.core.feed import CacheFeed, EventBatch, FeedMessage, SnapshotChunk
from emberkv.event_wire import decode, encode

TIER = "shm"
HASHES = [bytes([number]) * 32 for number in range(1, 7)]
SLOTS = 3
KEPT_EVENTS = 6
UNKNOWN = 0
"""In place of a change's number: it is not known which change the index goes by."""


class Store:
    """Blocks that processes share. changed: by block, the number of its last change. is_listed: it is memory of the
    processes, which tell of its blocks when they start, and which goes with the last of them; else a server.
    """

    def __init__(self, *, is_listed: bool) -> None:
        self.is_listed = is_listed
        self.blocks: set[bytes] = set()
        self.changed = dict.fromkeys(HASHES, UNKNOWN)
        self._changes = UNKNOWN

    def change(self, block_hashes: Iterable[bytes], *, there: bool) -> int:
        self._changes += 1
        for block_hash in block_hashes:
            (self.blocks.add if there else self.blocks.discard)(block_hash)
            self.changed[block_hash] = self._changes
        return self._changes

    def contents(self) -> Mapping[str, Sequence[bytes]]:
        return {TIER: sorted(self.blocks)} if self.is_listed else {}

    def tiers_of(self, block_hash: bytes) -> Sequence[str]:
        return (TIER,) if self.is_listed and block_hash in self.blocks else ()


class Process:
    """One that uses the store, with a log of a few events. numbers: of the changes, in the order of the log."""

    def __init__(self, store: Store, epoch: bytes) -> None:
        self._store = store
        self.log = EventLog(KEPT_EVENTS, epoch)
        self.feed = CacheFeed(BlockPool(1, 1, events=self.log), store)
        self.numbers: list[int] = []
        self._published = 0
        if store.is_listed and store.blocks:
            self.log.require_snapshot()
            self.numbers.append(UNKNOWN)

    def change(self, verb: str, block_hashes: Sequence[bytes]) -> None:
        events: dict[str, Callable[[], Event]] = {
            "store": lambda: BlockStored(tuple(block_hashes), bytes(32), (), 1, TIER),
            "evict": lambda: BlockRemoved(tuple(block_hashes), tier=TIER),
            "clear": lambda: AllBlocksCleared(TIER),
        }
        self.numbers.append(self._store.change(HASHES if verb == "clear" else block_hashes, there=verb == "store"))
        self.log.append(events[verb]())

    def publish(self) -> FeedMessage:
        message = self.feed.events(self._published)
        self._published = self.log.last_sequence
        return message

    def answer(self, reader: FeedReader) -> FeedMessage | None:
        match reader.need():
            case NeedEvents(after=after):
                return self.feed.events(after, limit=2)
            case NeedChunk(cursor=cursor):
                return self.feed.snapshot(cursor, limit=2)
            case None:
                return None


class Heard:
    """A replica's blocks in the index. Notes by which change the index goes, for each block."""

    def __init__(self, gateway: "Gateway", slot: int) -> None:
        listed = (TIER,) if gateway.store.is_listed else ()
        self._blocks = ReplicaBlocks(gateway.index, slot, unkept=lambda: gateway.unkept(slot), listed=lambda: listed)
        self._gateway = gateway
        self._is_listed = gateway.store.is_listed

    def apply(self, event: Event) -> None:
        self._blocks.apply(event)
        blocks = HASHES if isinstance(event, AllBlocksCleared) else event.block_hashes
        self._gateway.heard.update(dict.fromkeys(blocks, self._gateway.number_of(event)))

    def clear(self) -> None:
        self._blocks.clear()
        if self._is_listed:
            self._gateway.heard = dict.fromkeys(HASHES, UNKNOWN)

    def merge(self, chunk: SnapshotChunk) -> None:
        self._blocks.merge(chunk)
        self._gateway.heard.update(dict.fromkeys(chunk.block_hashes, UNKNOWN))

    def restart(self) -> None:
        self._blocks.restart()


class Gateway:
    """Follows processes by slot, as `Membership` does. heard: by block, the number of the change that it goes by."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.index = BlockIndex()
        self.processes: dict[int, Process] = {}
        self.readers: dict[int, FeedReader] = {}
        self.heard = dict.fromkeys(HASHES, UNKNOWN)
        self._numbers: list[tuple[Event, int]] = []
        self._starts = 0

    def start(self, slot: int) -> None:
        """A process is started, in place of the one that was there."""
        self.stop(slot)
        self._starts += 1
        process = Process(self.store, b"epoch %d" % self._starts)
        if slot not in self.readers:
            self.index.share(slot, {TIER: b"the store"})
            self.readers[slot] = FeedReader(Heard(self, slot))
        self.processes[slot] = process
        self.readers[slot].take(EventBatch(process.log.epoch, 1, ()))

    def stop(self, slot: int) -> None:
        if self.processes.pop(slot, None) is not None and not self.processes and self.store.is_listed:
            self.store.change(set(self.store.blocks), there=False)

    def leave(self, slot: int) -> None:
        """A process is stopped, and not expected any more."""
        self.stop(slot)
        if self.readers.pop(slot, None) is not None:
            self.index.leave(slot)
            if not self.readers:
                self.heard = dict.fromkeys(HASHES, UNKNOWN)

    def unkept(self, slot: int) -> Iterable[str]:
        if not self.store.is_listed or self.processes.keys() - {slot}:
            return ()
        self.heard = dict.fromkeys(HASHES, UNKNOWN)
        return (TIER,)

    def number_of(self, event: Event) -> int:
        return next(number for each, number in self._numbers if each is event)

    def take(self, slot: int, data: bytes, numbers: Sequence[int]) -> None:
        """numbers: of all changes of the process that has sent it."""
        message = decode(data)
        if slot not in self.readers:
            return
        if isinstance(message, EventBatch):
            self._numbers += [(event, numbers[message.first - 1 + at]) for at, event in enumerate(message.events)]
        self.readers[slot].take(message)

    def mend(self) -> None:
        for slot, process in self.processes.items():
            self.take(slot, encode(process.feed.events(process.log.last_sequence)), process.numbers)
            while (answer := process.answer(self.readers[slot])) is not None:
                self.take(slot, encode(answer), process.numbers)

    def has(self, block_hash: bytes) -> list[bool]:
        """By slot."""
        return [found == {TIER: 1} for found in self.index.matches([block_hash], SLOTS + 1)]


VERBS = ["start", "stop", "leave", "store", "store", "store", "store", "evict", "evict", "clear", "publish", "publish",
         "ask", "ask", "deliver", "deliver", "deliver", "repeat", "lose"]  # fmt: skip


@pytest.mark.parametrize("is_listed", [True, False])
def test_all_that_share_a_store_have_its_blocks_as_the_last_change_that_was_heard_of_says(is_listed: bool) -> None:
    checked = Counter[bool]()
    for seed in range(150):
        gateway = after_anything(Random(seed), is_listed=is_listed)
        for block_hash in HASHES:
            having = gateway.has(block_hash)
            assert len({having[slot] for slot in gateway.readers}) <= 1, "all that share the store have the same"
            assert not any(having[slot] for slot in range(SLOTS + 1) if slot not in gateway.readers)
            if gateway.readers and gateway.heard[block_hash] == gateway.store.changed[block_hash] != UNKNOWN:
                assert any(having) == (block_hash in gateway.store.blocks)
                checked[any(having)] += 1
    assert min(checked[True], checked[False]) > 40


def after_anything(rng: Random, *, is_listed: bool) -> Gateway:
    """A gateway that has mended what it has missed of what processes did, which came, stopped and left."""
    gateway = Gateway(Store(is_listed=is_listed))
    gateway.start(0)
    gateway.start(1)
    on_the_way: list[tuple[int, bytes, list[int]]] = []
    for _ in range(60):
        verb, slot, blocks = rng.choice(VERBS), rng.randrange(SLOTS), rng.sample(HASHES, rng.randint(1, 3))
        process, at = gateway.processes.get(slot), rng.randrange(len(on_the_way)) if on_the_way else 0
        if verb in ("start", "stop", "leave"):
            getattr(gateway, verb)(slot)
        elif process is not None and verb in ("store", "evict", "clear"):
            process.change(verb, blocks)
        elif process is not None and verb == "publish":
            on_the_way.append((slot, encode(process.publish()), process.numbers))
        elif process is not None and verb == "ask" and (answer := process.answer(gateway.readers[slot])) is not None:
            on_the_way.append((slot, encode(answer), process.numbers))
        elif on_the_way and verb in ("deliver", "repeat"):
            gateway.take(*(on_the_way.pop(at) if verb == "deliver" else on_the_way[at]))
        elif on_the_way and verb == "lose":
            del on_the_way[at]
    gateway.mend()
    return gateway


def started(*slots: int, is_listed: bool) -> Gateway:
    gateway = Gateway(Store(is_listed=is_listed))
    for slot in slots:
        gateway.start(slot)
    gateway.processes[slots[0]].change("store", HASHES)
    gateway.mend()
    assert [gateway.has(each)[: len(slots)] for each in HASHES] == [[True] * len(slots)] * len(HASHES)
    return gateway


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("verb", ["start", "stop", "leave"])
def test_what_a_process_has_stored_stays_with_the_others_when_it_restarts_or_goes(verb: str, is_listed: bool) -> None:
    gateway = started(0, 1, is_listed=is_listed)
    getattr(gateway, verb)(0)
    gateway.mend()
    assert [gateway.has(each) for each in HASHES] == [[verb != "leave", True, False, False]] * len(HASHES)


@pytest.mark.parametrize(("is_listed", "kept"), [(True, False), (False, True)])
def test_shared_memory_goes_with_its_last_process_and_a_server_keeps_its_blocks(is_listed: bool, kept: bool) -> None:
    gateway = started(0, 1, is_listed=is_listed)
    gateway.stop(0)
    gateway.stop(1)
    gateway.start(1)
    gateway.mend()
    assert [gateway.has(each) for each in HASHES] == [[kept, kept, False, False]] * len(HASHES)


@pytest.mark.parametrize("others", [(), (1,)])
def test_blocks_that_left_a_listed_store_by_lost_events_are_gone_after_the_snapshot(others: tuple[int, ...]) -> None:
    gateway = started(0, *others, is_listed=True)
    process = gateway.processes[0]
    process.change("evict", HASHES[:3])
    for _ in range(KEPT_EVENTS):
        process.change("store", HASHES[3:])
    gateway.mend()
    assert gateway.readers[0].exact
    held = [each in (0, *others) for each in range(SLOTS + 1)]
    assert [gateway.has(each) for each in HASHES] == [[False] * len(held)] * 3 + [held] * 3


def test_a_late_gateway_knows_of_a_listed_store_by_the_first_process_that_it_reads() -> None:
    before = started(0, is_listed=True)
    gateway, process = Gateway(before.store), before.processes[0]
    process.log.require_snapshot()
    process.numbers.append(UNKNOWN)
    gateway.index.share(1, {TIER: b"the store"})
    gateway.index.share(0, {TIER: b"the store"})
    gateway.processes[0], gateway.readers[0] = process, FeedReader(Heard(gateway, 0))
    gateway.mend()
    assert [gateway.has(each) for each in HASHES] == [[True, True, False, False]] * len(HASHES)
