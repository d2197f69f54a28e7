"""A removal is final at every interleaving of what the tiers' threads do, tried out one after another.

The manager's workers are not started; the test takes their steps itself: a change of a tier, and a read of one, which
may be interrupted between the tier's answer and its delivery.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from emberkv.core.hashing import partial_siblings_hash
from emberkv.core.loading import BlockRun
from emberkv.tiers.codec import BlockRecord
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.onboarding import Onboarding, Piece
from emberkv.tiers.worker import ReadResult, TierWorker
from tests.tiers.build import NAMESPACE, block_hashes, checkpoint, entry_of, records
from tests.tiers.tiers import LARGE

BLOCKS = records(2)
IDS = block_hashes(BLOCKS)
CHECKPOINT = checkpoint(BLOCKS[0], salt=b"tenant")
assert CHECKPOINT.partial is not None
PLACE = CHECKPOINT.partial
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """Two blocks of a prompt, what a removal names, and which of the two it removes. The first is a full block."""

    blocks: tuple[OffloadedBlock, OffloadedBlock]
    named: tuple[bytes, ...] | None
    removed: tuple[bool, bool]

    @property
    def block_hashes(self) -> list[bytes]:
        return [each.record.block_hash for each in self.blocks]


FULL = (OffloadedBlock(BLOCKS[0]), OffloadedBlock(BLOCKS[1]))
PARTIAL = (FULL[0], CHECKPOINT)
FIRST = Case(FULL, (IDS[0],), (True, False))
ALL = Case(FULL, None, (True, True))


@dataclass
class World:
    """Two tiers, of which the slow one has the blocks, and what is still to be called: an onboarding and a removal."""

    case: Case
    offloaded_first: bool
    tiers: tuple[MemoryTier, MemoryTier] = field(
        default_factory=lambda: (MemoryTier(LARGE, name="fast"), MemoryTier(LARGE, name="slow"))
    )
    removed: bool = False
    received: list[tuple[bool, list[BlockRecord | None]]] = field(default_factory=list)
    read: tuple[TierWorker, Onboarding, Piece, ReadResult] | None = None

    def __post_init__(self) -> None:
        self.manager = TierManager(self.tiers, namespace=NAMESPACE, queue_bytes=LARGE, start=False)
        self.tiers[1].store([entry_of(each) for each in self.case.blocks])
        if self.offloaded_first:
            self.manager.offload(self.case.blocks)
        self.calls: list[Step] = [self.remove, self.onboard]

    def found(self) -> list[bool]:
        """Which of the blocks a prompt would find."""
        found = []
        for each in self.case.blocks:
            if (place := each.partial) is None:
                found.append(bool(self.manager.peek([each.record.block_hash])))
            else:
                tokens, counts = each.record.tokens, range(place.count, place.count + 1)
                answer = self.manager.find_partial(place.parent, lambda of=tokens: of, counts)
                found.append(answer is not None)
        return found

    def remove(self) -> None:
        self.calls.remove(self.remove)
        _ = self.manager.clear() if self.case.named is None else self.manager.remove(self.case.named)
        self.removed = True
        assert not any(found and gone for found, gone in zip(self.found(), self.case.removed, strict=True))

    def onboard(self) -> None:
        """With runs that were found before, as a caller has them who is interrupted in between."""
        self.calls.remove(self.onboard)
        self.manager.onboard(
            self.case.block_hashes,
            [BlockRun("slow", 2, None)],
            lambda found: self.received.append((self.removed, found)),
            partial=self.case.blocks[1].partial,
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


def interleavings(case: Case, offloaded_first: bool) -> Iterator[World]:
    """The world after every possible order of steps: each path is taken from the start."""
    pending: list[list[int]] = [[]]
    while pending:
        path = pending.pop()
        world = World(case, offloaded_first)
        for choice in path:
            world.steps()[choice]()
        steps = world.steps()
        if not steps:
            yield world
        pending += [[*path, choice] for choice in range(len(steps))]


def check(case: Case, offloaded_first: bool) -> int:
    count = 0
    for world in interleavings(case, offloaded_first):
        count += 1
        ((after_removal, found),) = world.received
        for at, (block_hash, is_removed) in enumerate(zip(case.block_hashes, case.removed, strict=True)):
            if is_removed:
                assert world.manager.tiers_of(block_hash) == []
                assert all(tier.lookup([block_hash]) == 0 for tier in world.tiers)
                assert found[at] is None or not after_removal
            else:
                assert "slow" in world.manager.tiers_of(block_hash)
    return count


def test_a_removed_block_is_in_no_tier_and_given_to_nobody_afterwards() -> None:
    assert check(FIRST, offloaded_first=False) > 10
    assert check(FIRST, offloaded_first=True) > 100


def test_nor_is_anything_after_a_clear() -> None:
    assert check(ALL, offloaded_first=False) > 10
    assert check(ALL, offloaded_first=True) > 50


@pytest.mark.parametrize(
    ("named", "removed"),
    [
        ((IDS[0],), (True, True)),
        ((partial_siblings_hash(PLACE.parent),), (False, True)),
        ((partial_siblings_hash(PLACE.previous), IDS[1]), (False, False)),
        (None, (True, True)),
    ],
    ids=["the block before it", "its parent", "another parent", "all"],
)
@pytest.mark.parametrize("offloaded_first", [False, True])
def test_nor_is_a_partial_block_whatever_names_it(
    named: tuple[bytes, ...] | None, removed: tuple[bool, bool], offloaded_first: bool
) -> None:
    """Its parent has a tenant's salt, which the hash of the block before it has not."""
    assert check(Case(PARTIAL, named, removed), offloaded_first) > 10


def test_what_is_offloaded_after_a_removal_is_stored() -> None:
    world = World(Case(PARTIAL, (IDS[0],), (True, True)), offloaded_first=True)
    world.remove()
    world.manager.offload(PARTIAL)
    assert world.found() == [False, False]
    while not all(worker.idle for worker in world.manager.workers):
        for worker in world.manager.workers:
            if not worker.idle:
                world.change(worker)
    assert world.found() == [True, True]
    assert [world.manager.tiers_of(each) for each in world.case.block_hashes] == [["fast", "slow"]] * 2
