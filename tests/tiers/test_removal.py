"""A removal is final at every interleaving of what the tiers' threads do, tried out one after another.

The manager's workers are not started; the test takes their steps itself: a change of a tier, and a read of one, which
may be interrupted between the tier's answer and its delivery.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from emberkv.core.loading import BlockRun
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.onboarding import Onboarding, Piece
from emberkv.tiers.worker import Reading, TierWorker
from tests.tiers.build import NAMESPACE, block_hashes, entries, records
from tests.tiers.tiers import LARGE

BLOCKS = records(2)
IDS = block_hashes(BLOCKS)
Step = Callable[[], None]


@dataclass
class World:
    """Two tiers, of which the slow one has the blocks, and what is still to be called: an onboarding and a removal."""

    everything: bool
    offloaded_first: bool
    tiers: tuple[MemoryTier, MemoryTier] = field(
        default_factory=lambda: (MemoryTier(LARGE, name="fast"), MemoryTier(LARGE, name="slow"))
    )
    removed: bool = False
    received: list[tuple[bool, list[BlockRecord | None]]] = field(default_factory=list)
    read: tuple[TierWorker, Onboarding, Piece, Reading] | None = None

    def __post_init__(self) -> None:
        self.manager = TierManager(self.tiers, namespace=NAMESPACE, queue_bytes=LARGE, start=False)
        self.tiers[1].store(entries(BLOCKS))
        if self.offloaded_first:
            self.manager.offload([OffloadedBlock(block) for block in BLOCKS])
        self.calls: list[Step] = [self.remove, self.onboard]

    def remove(self) -> None:
        self.calls.remove(self.remove)
        _ = self.manager.clear() if self.everything else self.manager.remove(IDS[:1])
        self.removed = True
        assert self.manager.find(IDS) == []

    def onboard(self) -> None:
        """With runs that were found before, as a caller has them who is interrupted in between."""
        self.calls.remove(self.onboard)
        self.manager.onboard(
            IDS, [BlockRun("slow", 2, None)], lambda found: self.received.append((self.removed, found))
        )

    def change(self, worker: TierWorker) -> None:
        with worker.lock:
            job = worker.take()
        assert job is not None
        worker.run(job)
        with worker.lock:
            worker.finish(job)

    def begin_read(self, worker: TierWorker) -> None:
        with worker.lock:
            turn = worker.begin_read()
        if turn is not None:
            self.read = (worker, *turn, worker.read(*turn))

    def end_read(self) -> None:
        read, self.read = self.read, None
        assert read is not None
        self.manager.read_ended(*read)

    def steps(self) -> list[Step]:
        """What may happen next."""
        changes = [lambda w=worker: self.change(w) for worker in self.manager.workers if not worker.idle]
        reads: list[Step] = []
        if self.read is not None:
            reads = [self.end_read]
        elif self.onboard not in self.calls and not self.received:
            reads = [lambda: self.begin_read(self.manager.workers[1])]
        return [*self.calls, *changes, *reads]


def interleavings(everything: bool, offloaded_first: bool) -> Iterator[World]:
    """The world after every possible order of steps: each path is taken from the start."""
    pending: list[list[int]] = [[]]
    while pending:
        path = pending.pop()
        world = World(everything, offloaded_first)
        for choice in path:
            world.steps()[choice]()
        steps = world.steps()
        if not steps:
            yield world
        pending += [[*path, choice] for choice in range(len(steps))]


def check(everything: bool, offloaded_first: bool) -> int:
    count = 0
    for world in interleavings(everything, offloaded_first):
        count += 1
        first = [world.manager.tiers_of(each) for each in IDS]
        assert first[0] == []
        assert all(tier.lookup(IDS[:1]) == 0 for tier in world.tiers)
        assert everything <= (first[1] == [])
        ((after_removal, found),) = world.received
        assert found[0] is None or not after_removal
    return count


def test_a_removed_block_is_in_no_tier_and_given_to_nobody_afterwards() -> None:
    assert check(everything=False, offloaded_first=False) > 10
    assert check(everything=False, offloaded_first=True) > 100


def test_nor_is_anything_after_a_clear() -> None:
    assert check(everything=True, offloaded_first=False) > 10
    assert check(everything=True, offloaded_first=True) > 50


def test_what_is_offloaded_after_a_removal_is_stored() -> None:
    world = World(everything=False, offloaded_first=True)
    world.remove()
    world.manager.offload([OffloadedBlock(block) for block in BLOCKS[:1]])
    assert world.manager.find(IDS[:1]) == []
    while not all(worker.idle for worker in world.manager.workers):
        for worker in world.manager.workers:
            if not worker.idle:
                world.change(worker)
    assert world.manager.tiers_of(IDS[0]) == ["fast", "slow"]
