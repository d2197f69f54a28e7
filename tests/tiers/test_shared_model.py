"""Tiers that processes share, against a model: any order of what several of them do, over one place."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from emberkv.tiers.base import Tier
from emberkv.tiers.remote.tier import ENTRY_BYTES, RemoteTier
from emberkv.tiers.shm.tier import ShmTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, records
from tests.tiers.redis_process import RedisProcess

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
PROCESSES = 3
RECORD_BYTES = len(ENTRIES[0].data)

Open = Callable[[str, int], Tier]
"""``open(place, blocks)``: a tier with room for so many, over a place that starts empty."""

which = st.integers(0, PROCESSES - 1)
some = st.lists(st.integers(0, len(IDS) - 1), min_size=1, max_size=3, unique=True)


class SharedMachine(RuleBasedStateMachine):
    """``there`` holds what may be there: stored since it was last removed. Eviction alone may take of it."""

    def __init__(self, open_tier: Open) -> None:
        super().__init__()
        self._open = open_tier
        self.there: set[int] = set()
        self.removals = 0
        self.removed_at = dict.fromkeys(range(len(IDS)), 0)

    @initialize(blocks=st.sampled_from([2, 4, 6]))
    def open_all(self, blocks: int) -> None:
        self.folder = TemporaryDirectory()
        self.blocks = blocks
        self.tiers = [self._open(self.folder.name, blocks) for _ in range(PROCESSES)]
        self.tiers[0].store(ENTRIES[:1])  # the place is made
        self.there = {0}
        for tier in self.tiers:
            tier.refresh()
        self.seen = [(tier.removals_seen, 0) for tier in self.tiers]

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()
        self.folder.cleanup()

    @rule(process=which)
    def compute(self, process: int) -> None:
        """From now on it stores what it makes now."""
        self.tiers[process].refresh()
        self.seen[process] = (self.tiers[process].removals_seen, self.removals)

    @rule(process=which, at=some)
    def store(self, process: int, at: list[int]) -> None:
        seen, removals = self.seen[process]
        allowed = {each for each in at if self.removed_at[each] <= removals or each in self.there}
        stored = self.tiers[process].store([ENTRIES[each] for each in at], seen=seen)
        assert stored.count <= len(allowed)
        self.there |= allowed
        self.there -= {IDS.index(each) for each in stored.evicted}

    @rule(process=which, at=some)
    def remove(self, process: int, at: list[int]) -> None:
        removed = self.tiers[process].remove([IDS[each] for each in at])
        assert (removed.count <= len(self.there & set(at)), removed.kept) == (True, 0)
        self._removed(at)

    @rule(process=which)
    def clear(self, process: int) -> None:
        assert self.tiers[process].clear().count <= len(self.there)
        self._removed(range(len(IDS)))

    def _removed(self, at: "list[int] | range") -> None:
        self.removals += 1
        self.there -= set(at)
        self.removed_at.update(dict.fromkeys(at, self.removals))

    @rule(process=which, at=some)
    def touch(self, process: int, at: list[int]) -> None:
        self.tiers[process].touch([IDS[each] for each in at])

    @rule(process=which)
    def load(self, process: int) -> None:
        """Also by a process that has not taken in the others' changes."""
        for each, found in enumerate(self.tiers[process].load(IDS)):
            assert found is None or (found == ENTRIES[each] and each in self.there)

    @invariant()
    def all_agree_within_the_limit(self) -> None:
        for tier in getattr(self, "tiers", ()):
            tier.refresh()
            found = {at for at, block_hash in enumerate(IDS) if tier.query([block_hash])}
            assert found <= self.there
            assert len(found) == tier.stats().entries <= self.blocks
            assert tier.stats().bytes <= tier.stats().max_bytes
            assert len(found) == min(len(self.there), self.blocks)


def shm(place: str, blocks: int) -> Tier:
    return ShmTier.open(blocks * -(-RECORD_BYTES // 64) * 64, namespace=NAMESPACE, folder=Path(place))


def remote(server: RedisProcess, place: str, blocks: int) -> Tier:
    size = blocks * (RECORD_BYTES + ENTRY_BYTES)
    return RemoteTier(server.address, size, namespace=NAMESPACE, prefix=place.encode()).connect()


@pytest.mark.parametrize("kind", ["shm", "remote"])
def test_what_is_there_is_what_was_stored_and_not_removed(kind: str, request: pytest.FixtureRequest) -> None:
    open_tier = shm if kind == "shm" else partial(remote, request.getfixturevalue("redis_server"))
    run_state_machine_as_test(
        lambda: SharedMachine(open_tier), settings=settings(max_examples=25, stateful_step_count=20, deadline=None)
    )
