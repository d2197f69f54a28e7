"""Look-ups that a tier answers after I/O, at every interleaving of answer, deadline, removal and shutdown."""

from collections.abc import Callable, Iterator
from threading import Event as Flag

import pytest

from emberkv.core.events import BlockRemoved, BlockStored, Event
from emberkv.core.loading import BlockRun, LookupStatus
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.onboarding import Query
from emberkv.tiers.worker import ANSWER_SECONDS
from tests.tiers.build import NAMESPACE, block_hashes, entries, fetched, inexact, records
from tests.tiers.harness import Clock
from tests.tiers.tiers import LARGE, RemoteTier
from tests.waiting import DEADLINE

BLOCKS = records(4)
IDS = block_hashes(BLOCKS)
PENDING, MISS = LookupStatus.PENDING, LookupStatus.MISS
Step = Callable[[], None]


class World:
    """A RAM tier that has the first block and a remote tier that has three; a test takes the threads' steps itself."""

    def __init__(self) -> None:
        self.ram, self.remote, self.clock = MemoryTier(LARGE), RemoteTier(), Clock()
        self.ram.store(entries(BLOCKS[:1]))
        self.remote.store(entries(BLOCKS[:3]))
        self.manager = TierManager(
            [self.ram, self.remote], namespace=NAMESPACE, queue_bytes=LARGE, clock=self.clock, start=False
        )
        self.worker = self.manager.workers[1]
        self.delivered = 0
        self.query: Query | None = None
        self.answer: tuple[Query, int] | None = None
        self.answered = self.given_up = self.removed = self.closed = False
        self.calls: list[Step] = [self.ask, self.remove, self.close]

    def ask(self) -> None:
        if self.ask in self.calls:
            self.calls.remove(self.ask)
            self.calls.append(self.give_up)
        self.query = self.manager.ask(IDS[1:], self._done)

    def _done(self) -> None:
        self.delivered += 1

    def begin(self) -> None:
        with self.worker.lock:
            query = self.worker.begin_query()
        assert query is not None
        self.answer = (query, self.worker.query(query))

    def end(self) -> None:
        answer, self.answer = self.answer, None
        assert answer is not None
        self.manager.query_ended(self.worker, *answer)
        self.answered = True

    def give_up(self) -> None:
        self.calls.remove(self.give_up)
        assert self.query is not None
        self.manager.cancel_query(self.query)
        self.given_up = True

    def remove(self) -> None:
        self.calls.remove(self.remove)
        self.manager.remove(IDS[1:2])
        self.removed = True

    def change(self) -> None:
        with self.worker.lock:
            job = self.worker.take()
        assert job is not None
        self.worker.run(job)
        with self.worker.lock:
            self.worker.finish(job)

    def close(self) -> None:
        self.calls.remove(self.close)
        self.manager.close(0.0)
        self.closed = True

    def steps(self) -> list[Step]:
        steps = list(self.calls)
        if self.answer is not None:
            steps.append(self.end)
        elif self.query is not None and self.query.ranks and not self.closed:
            steps.append(self.begin)
        return steps if self.worker.idle else [*steps, self.change]

    def found(self) -> list[tuple[str, int]]:
        return [(run.tier, run.count) for run in self.manager.find(IDS)]

    def check(self) -> None:
        """What a caller may rely on, whatever has happened so far."""
        known = self.answered and not self.removed and not self.closed and self.answer is None
        assert self.found() == ([] if self.closed else [("ram", 1), ("remote", 2)] if known else [("ram", 1)])
        if self.closed or (self.given_up and self.answer is not None):
            assert self.manager.status(IDS[1]) is MISS
        assert self.delivered <= 1
        if self.given_up or (self.closed and self.query is not None and self.answer is None):
            assert self.delivered == 1


def worlds() -> Iterator[World]:
    """The world at the end of every order of steps; each path is taken from the start."""
    pending: list[list[int]] = [[]]
    while pending:
        path = pending.pop()
        world = World()
        for choice in path:
            world.steps()[choice]()
        world.check()
        steps = world.steps()
        if not steps:
            yield world
        pending += [[*path, choice] for choice in range(len(steps))]


def test_a_look_up_ends_once_and_finds_nothing_that_was_removed_at_every_interleaving() -> None:
    count = 0
    for world in worlds():
        count += 1
        assert world.delivered == 1
        assert world.answer is None
    assert count > 50


def test_an_answer_is_what_find_then_knows() -> None:
    world = World()
    assert (world.found(), world.manager.status(IDS[1])) == ([("ram", 1)], PENDING)
    world.ask()
    assert world.query is not None
    assert (world.query.seconds, world.delivered) == (1.0, 0)
    world.begin()
    world.end()
    assert (world.delivered, world.remote.queries) == (1, [3])
    assert world.manager.find(IDS) == [BlockRun("ram", 1, None), BlockRun("remote", 2, None)]
    assert world.manager.status(IDS[3]) is MISS
    stats = world.manager.stats()
    assert [(stats[name].hits, stats[name].misses) for name in ("ram", "remote")] == [(1, 3), (2, 1)]


def test_an_answer_is_forgotten_after_a_while() -> None:
    world = World()
    world.ask()
    world.begin()
    world.end()
    world.clock.now = ANSWER_SECONDS
    assert (world.found(), world.manager.status(IDS[1])) == ([("ram", 1)], PENDING)


def test_a_block_that_is_stored_after_a_miss_is_looked_up_again() -> None:
    world = World()
    world.ask()
    world.begin()
    world.end()
    assert world.manager.status(IDS[3]) is MISS
    world.manager.offload([OffloadedBlock(BLOCKS[3])])
    world.change()
    assert world.manager.stats()["remote"].entries == 4
    assert world.manager.status(IDS[3]) is PENDING


def reporting() -> tuple[World, list[Event]]:
    """A world whose remote tier has lost the last block, which this process has stored, and the events of its tiers."""
    world, events = World(), list[Event]()
    world.manager.offload([OffloadedBlock(BLOCKS[3])])
    while not world.worker.idle:
        world.change()
    world.manager.on_event = events.append
    world.remote.remove(IDS[3:])
    return world, events


def look_up(world: World) -> None:
    """After the last answer is forgotten."""
    world.clock.now += ANSWER_SECONDS
    world.ask()
    world.begin()
    world.end()


def test_a_look_up_reports_once_the_block_that_a_tier_has_lost_and_no_other() -> None:
    world, events = reporting()
    look_up(world)
    assert events == [BlockRemoved((IDS[3],), tier="remote")]
    look_up(world)
    assert len(events) == 1


def test_a_block_that_was_found_before_is_reported_as_lost() -> None:
    world, events = World(), list[Event]()
    world.manager.on_event = events.append
    look_up(world)
    assert events == [], "the last block was never there"
    world.remote.remove(IDS[2:3])
    look_up(world)
    assert events == [BlockRemoved((IDS[2],), tier="remote")]


def test_a_block_that_was_removed_is_not_reported_as_lost() -> None:
    world, events = reporting()
    world.manager.remove(IDS[3:])
    while not world.worker.idle:
        world.change()
    events.clear()
    look_up(world)
    assert events == []


def test_only_the_blocks_that_were_there_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    world, events = reporting()
    monkeypatch.setattr("emberkv.tiers.worker.MAX_KNOWN_BLOCKS", 1)
    world.manager.offload([OffloadedBlock(BLOCKS[3])])
    while not world.worker.idle:
        world.change()
    world.query = world.manager.ask(IDS[2:3], lambda: None)
    world.begin()
    world.end()
    world.remote.remove(IDS[3:])
    events.clear()
    look_up(world)
    assert events == []


def test_a_tier_that_fails_is_not_reported_to_have_lost_a_block() -> None:
    world, events = reporting()
    world.remote.broken = True
    look_up(world)
    world.remote.broken = False
    assert (events, world.manager.status(IDS[1])) == ([], PENDING)


@pytest.mark.parametrize("changed", [True, False], ids=["stored", "queued to be stored"])
def test_a_block_that_is_stored_while_it_is_looked_up_is_not_reported_as_lost(changed: bool) -> None:
    world, events = reporting()
    world.ask()
    world.begin()
    world.manager.offload([OffloadedBlock(BLOCKS[3])])
    if changed:
        world.change()
        assert [type(event) for event in events] == [BlockStored]
        events.clear()
    world.end()
    assert (events, world.manager.status(IDS[3])) == ([], PENDING if changed else MISS)


def test_an_answer_for_inexact_blocks_says_nothing_of_exact_ones() -> None:
    world = World()
    world.remote.remove(IDS[1:2])
    world.remote.store(entries([inexact(BLOCKS[1])]))
    world.ask()
    world.begin()
    world.end()
    assert world.found() == [("ram", 1), ("remote", 2)]
    assert world.manager.status(IDS[1], exact=True) is PENDING


@pytest.mark.parametrize("broken", [True, False])
def test_a_tier_that_fails_or_is_stuck_counts_as_a_miss(broken: bool) -> None:
    world = World()
    world.remote.broken = broken
    world.ask()
    if broken:
        world.begin()
        world.end()
        assert world.manager.stack_stats().failures == {"ConnectionError": 1}
    else:
        with world.worker.lock:
            assert world.worker.begin_query() is world.query
        world.give_up()
        assert world.manager.stats()["remote"].errors == {"stalled": 1}
    assert world.manager.stats()["remote"].lookup_latency.count == int(broken)
    status = PENDING if broken else MISS  # to have failed says nothing of any block
    assert (world.delivered, world.found(), world.manager.status(IDS[1])) == (1, [("ram", 1)], status)


def test_the_workers_threads_answer_and_the_blocks_are_read() -> None:
    remote = RemoteTier()
    remote.store(entries(BLOCKS))
    manager = TierManager([remote], namespace=NAMESPACE, queue_bytes=LARGE)
    assert manager.find(IDS) == []
    done = Flag()
    remote.gate.clear()
    manager.ask(IDS, done.set)
    assert remote.began.wait(DEADLINE)
    assert not done.is_set()
    remote.gate.set()
    assert done.wait(DEADLINE)
    assert fetched(manager, BLOCKS) == BLOCKS
    assert manager.close(DEADLINE)


def test_the_end_answers_what_a_stuck_tier_does_not() -> None:
    remote = RemoteTier()
    manager = TierManager([remote], namespace=NAMESPACE, queue_bytes=LARGE)
    remote.gate.clear()
    done = Flag()
    manager.ask(IDS, done.set)
    assert remote.began.wait(DEADLINE)
    assert manager.close(0.0)
    assert done.is_set()
    remote.gate.set()
