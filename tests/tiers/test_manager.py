"""A slow, stuck or damaged tier: others are not held up, and what is damaged is replaced at once."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from emberkv.core.loading import BlockRun
from emberkv.core.policies.eviction import LRU
from emberkv.core.policies.fair_shares import FairShares, Share
from emberkv.tiers.base import TierEntry
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, fetched, inexact, records
from tests.tiers.disks import files_of, opened
from tests.tiers.tiers import LARGE, GatedTier
from tests.waiting import DEADLINE

BLOCKS = records(83)
IDS = block_hashes(BLOCKS)


def offloaded(manager: TierManager) -> None:
    manager.offload([OffloadedBlock(each) for each in BLOCKS])


def test_a_tier_that_is_stuck_holds_up_no_other() -> None:
    fast, slow = MemoryTier(LARGE), GatedTier("slow")
    manager = TierManager([fast, slow], namespace=NAMESPACE, queue_bytes=LARGE)
    slow.gate.clear()
    offloaded(manager)
    assert slow.began.wait(DEADLINE)
    removals = manager.remove(IDS[:1])
    removals["ram"].result(DEADLINE)
    assert not removals["slow"].done()
    assert manager.find(IDS[1:]) == [BlockRun("ram", 82, None)]
    slow.gate.set()
    assert removals["slow"].result(DEADLINE).count == 1
    assert manager.close(DEADLINE)


def test_a_tier_whose_read_was_given_up_is_not_searched_until_it_answers() -> None:
    tier = GatedTier("slow")
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    tier.store(entries(BLOCKS))
    tier.began.clear()
    tier.gate.clear()
    ended = threading.Event()
    onboarding = manager.onboard(IDS, manager.find(IDS), lambda _: ended.set())
    assert tier.began.wait(DEADLINE)
    assert manager.cancel(onboarding) == [None] * 83
    assert manager.find(IDS) == []
    assert manager.stats()["slow"].errors == {"stalled": 1}
    tier.gate.set()
    assert ended.wait(DEADLINE)
    assert fetched(manager, BLOCKS) == BLOCKS
    assert manager.close(DEADLINE)


STUCK = """
import threading
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from tests.tiers.build import NAMESPACE, entries, block_hashes, records

class Stuck(MemoryTier):
    def load(self, block_hashes):
        threading.Event().wait()
    def store(self, entries, *, seen=None):
        threading.Event().wait()

blocks = records(4)
tier = Stuck(2**20)
MemoryTier.store(tier, entries(blocks[:3]))
manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=2**20)
manager.offload([OffloadedBlock(blocks[3])])
manager.onboard(block_hashes(blocks), manager.find(block_hashes(blocks)), lambda found: print(found))
print(manager.close(0.05))
"""


def test_the_process_ends_whatever_a_disk_does() -> None:
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert ended.stdout == "[None, None, None, None]\nFalse\n"


def test_a_load_during_a_replacement_sees_the_whole_of_one_entry() -> None:
    """Inexact flags never come with an exact block's bytes: the replacement is stopped where room is made for it."""
    before, after = entries([inexact(BLOCKS[0])])[0], entries(BLOCKS[:1])[0]
    found: list[TierEntry | None] = []

    class Watched:
        def __init__(self) -> None:
            self._policy = LRU[bytes]()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._policy, name)

        def discard(self, key: bytes) -> None:
            found.append(tier._entries.get(key))
            self._policy.discard(key)

    tier = MemoryTier(LARGE, policy=Watched)
    tier.store([before])
    tier.store([after])
    assert [*found, *tier.load(IDS[:1])] == [before, after]


def test_a_refused_replacement_leaves_the_old_entry() -> None:
    """Another owner's floor leaves no room for an exact entry that is larger than the inexact one."""
    small, large = entries([inexact(BLOCKS[0])])[0], entries(records(1, payload_bytes=300))[0]
    others = entries(BLOCKS[1:3], owner="floor")
    size = sum(len(each.data) + 64 for each in (small, *others))
    shares = {"floor": Share(floor_bytes=size)}
    tier = MemoryTier(size, policy=lambda: FairShares(LRU, shares, Share()))
    assert tier.store([small]).count == tier.store(others[:1]).count == tier.store(others[1:]).count == 1
    assert tier.store([large]).count == 0
    assert tier.load(IDS[:1]) == [small]
    assert tier.stats().skipped == {"no room": 1}


def test_a_run_of_damaged_blocks_is_stored_anew_in_one_go(tmp_path: Path) -> None:
    manager = TierManager([opened(tmp_path)], namespace=NAMESPACE, queue_bytes=LARGE)
    offloaded(manager)
    assert manager.flush(DEADLINE)
    for path in files_of(tmp_path):
        path.write_bytes(b"damaged")
    received = threading.Event()
    manager.onboard(IDS, manager.find(IDS), lambda _: received.set())
    assert received.wait(DEADLINE)
    offloaded(manager)  # as they are computed
    assert manager.flush(DEADLINE)
    assert manager.stats()["disk"].corrupt == {"truncated": 83}
    assert fetched(manager, BLOCKS) == BLOCKS
    assert manager.close(DEADLINE)


def test_sound_blocks_behind_a_damaged_one_are_kept(tmp_path: Path) -> None:
    manager = TierManager([opened(tmp_path)], namespace=NAMESPACE, queue_bytes=LARGE)
    offloaded(manager)
    assert manager.flush(DEADLINE)
    next(path for path in files_of(tmp_path) if path.name.startswith(IDS[20].hex())).write_bytes(b"damaged")
    assert fetched(manager, BLOCKS)[:21] == [*BLOCKS[:20], None]
    assert manager.stats()["disk"].corrupt == {"truncated": 1}
    assert [len(manager.tiers_of(each)) for each in IDS] == [1] * 20 + [0] + [1] * 62
    assert manager.close(DEADLINE)
