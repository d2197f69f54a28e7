"""The shared-memory tier between processes: what one stores another finds, and a killed one does no harm."""

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from emberkv.core.policies.eviction import LRU
from emberkv.errors import ConfigError
from emberkv.tiers.base import RemovalResult, TierEntry
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.shm.arena import Arena
from emberkv.tiers.shm.tier import LOCKED, ShmTier
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, records
from tests.tiers.killed_process import CHAINS, QUOTA, open_stack, served_right
from tests.waiting import DEADLINE, eventually

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
SLOT = -(-len(ENTRIES[0].data) // 64) * 64
LARGE = 100 * SLOT


def opened(folder: Path, max_bytes: int = LARGE, *, namespace: bytes = NAMESPACE) -> ShmTier:
    return ShmTier.open(max_bytes, namespace=namespace, policy=LRU, folder=folder)


def arena_of(tier: ShmTier) -> Arena:
    assert tier._arena is not None
    return tier._arena


@contextmanager
def child(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with a tier in the folder, which has run ``code``, says so and waits to be killed."""
    program = f"""
import time
from pathlib import Path
from tests.tiers.test_shm_tier import *
tier = opened(Path({str(folder)!r}))
{code}
print("done", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "done\n"
            yield process
        finally:
            process.kill()


def test_what_another_process_stores_is_found_and_read(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    with child(tmp_path, "tier.store(ENTRIES)"):
        eventually(lambda: tier.lookup(IDS) == 6)  # the manager's thread takes in the changes
        assert tier.load(IDS) == ENTRIES
        assert tier.remove(IDS[:1]) == RemovalResult(1)
    assert manager.close(DEADLINE)


def test_what_a_killed_process_has_stored_is_there_for_the_next_one(tmp_path: Path) -> None:
    with child(tmp_path, "tier.store(ENTRIES[:4])") as process:
        process.kill()
        process.wait()
    tier = opened(tmp_path)
    assert tier.load(IDS) == [*ENTRIES[:4], None, None]
    tier.close()


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_slot_empty_and_no_lock(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    tier.store(ENTRIES[:2])
    half = """
with arena_of(tier).writing(1) as held:
    assert held
    arena_of(tier)._begin_change(tier._index[IDS[0]].number)
    print("done", flush=True)
    time.sleep(1000)
"""
    with child(tmp_path, half):
        assert tier.load(IDS[:2]) == [None, ENTRIES[1]]
        assert tier.store(ENTRIES[2:3]).count == 0
        assert tier.stats().skipped == {"another process writes": 1}
    assert tier.store(ENTRIES[2:3]).count == 1
    assert [tier.lookup([each]) for each in IDS[:3]] == [0, 1, 1]
    assert tier.store(ENTRIES[:1]).count == 1
    assert tier.load(IDS[:3]) == ENTRIES[:3]
    tier.close()


def test_a_stopped_process_that_has_the_lock_holds_up_no_removal(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    tier.store(ENTRIES[:2])
    holding = "context = arena_of(tier).writing(1)\nassert context.__enter__()"
    with child(tmp_path, holding) as process:
        process.send_signal(signal.SIGSTOP)
        assert tier.remove(IDS[:1]) == RemovalResult(0, 1, LOCKED)
        assert (tier.lookup(IDS[:1]), tier.load(IDS[:2])) == (0, [None, ENTRIES[1]])
    tier.refresh()
    assert tier.stats().entries == 1
    assert tier.store(ENTRIES[:1]).count == 1
    tier.close()


def test_processes_killed_at_random_moments_leave_only_sound_blocks(tmp_path: Path, long: bool) -> None:
    rng = random.Random(3)
    for round_ in range(30 if long else 2):
        command = [sys.executable, "-m", "tests.tiers.killed_process", str(tmp_path)]
        processes = [
            subprocess.Popen([*command, str(2 * round_ + number), "shm"], stdout=subprocess.PIPE, text=True)
            for number in range(2)
        ]
        for process in processes:
            assert process.stdout
            said = [process.stdout.readline() for _ in range(rng.randint(20, 60))]
            assert set(said) == {"fine\n"}
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()
        stack = open_stack(tmp_path, "shm")
        assert stack.stats()["shm"].entries > 0
        assert all(served_right(stack, number) for number in range(len(CHAINS)))
        stats = stack.stats()["shm"]
        assert (stats.corrupt, stats.errors, stats.bytes <= QUOTA) == ({}, {}, True)
        arena_of_stack = stack.workers[1].tier
        assert isinstance(arena_of_stack, ShmTier)
        os.rename(arena_of_stack._path, tmp_path / "kept")  # so that closing it does not end it
        assert stack.close(DEADLINE)
        os.rename(tmp_path / "kept", arena_of_stack._path)


def test_memory_is_given_back_by_the_last_process_alone(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.store(ENTRIES[:1])
    second.refresh()
    (path,) = tmp_path.iterdir()
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o600, os.geteuid())
    first.close()
    assert path.exists()
    assert second.load(IDS[:1]) == ENTRIES[:1]
    assert (first.lookup(IDS), first.load(IDS[:1]), first.store(ENTRIES[1:2]).count) == (0, [None], 0)
    second.close()
    assert not path.exists()


def test_the_arena_of_another_model_goes_when_no_process_uses_it(tmp_path: Path) -> None:
    used = opened(tmp_path, namespace=OTHER)
    used.store(entries(BLOCKS[:1], namespace=OTHER))
    with child(tmp_path, "tier.store(ENTRIES[:1])") as process:
        process.kill()
        process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    third = opened(tmp_path, namespace=b"a third model")
    assert list(tmp_path.iterdir()) == [used._path]
    assert used.lookup(IDS) == 1
    third.close()
    used.close()


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_an_arena_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    tier = opened(tmp_path)
    tier.store(ENTRIES[:1])
    tier._path.chmod(mode)
    with pytest.raises(ConfigError, match="not a file that this user alone may read and write"):
        opened(tmp_path)
    tier.close()


def test_a_link_in_the_arena_s_place_is_refused(tmp_path: Path) -> None:
    path = opened(tmp_path)._path
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="--shm-tier cannot be used"):
        opened(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_size_beyond_the_file_system_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shm-tier is 4,611,686,018,427,387,904 bytes; .* left, so give less"):
        opened(tmp_path, 2**62)


def test_the_first_process_decides_the_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(tmp_path, 4 * SLOT)
    first.store(ENTRIES[:1])
    second = opened(tmp_path, 8 * SLOT)
    assert "the process that was first has made it" in caplog.messages[-1]
    assert second.stats().max_bytes == 4 * SLOT
    for entry in ENTRIES:
        second.store([entry])
    assert second.stats().bytes == 4 * SLOT
    first.close()
    second.close()


def test_a_block_that_another_process_has_used_is_evicted_later(tmp_path: Path) -> None:
    first, second = opened(tmp_path, 3 * SLOT), opened(tmp_path, 3 * SLOT)
    for entry in ENTRIES[:3]:
        first.store([entry])
    second.refresh()
    second.load(IDS[:1])
    assert first.store([ENTRIES[3]]).evicted == [IDS[1]]
    second.refresh()
    assert [second.lookup([each]) for each in IDS[:4]] == [1, 0, 1, 1]
    first.close()
    second.close()


def test_a_process_that_is_far_behind_looks_at_all_slots(tmp_path: Path) -> None:
    first, second = opened(tmp_path, 3 * SLOT), opened(tmp_path, 3 * SLOT)
    first.store(ENTRIES[:1])
    second.refresh()
    for _ in range(2100):
        first.remove(IDS[:1])
        first.store(ENTRIES[:1])
    first.store(ENTRIES[1:3])
    second.refresh()
    assert second.load(IDS[:4]) == [*ENTRIES[:3], None]
    assert second.stats().bytes == first.stats().bytes == 3 * SLOT
    first.close()
    second.close()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("order", sorted(set(permutations("sscr"))))
def test_a_removal_is_final_at_every_order_of_stores_looks_and_removals(
    tmp_path: Path, order: tuple[str, ...], everything: bool
) -> None:
    """s: a process stores what it made before; c: it takes in what has changed; r: another one removes."""
    writer, remover = opened(tmp_path), opened(tmp_path)
    writer.store(ENTRIES[5:])  # the arena is there
    remover.refresh()
    seen = writer.removals_seen
    removed = there = False
    for step in order:
        if step == "s":
            stored = writer.store(ENTRIES[:1], seen=seen).count == 1
            assert stored is not removed
            there = stored
        elif step == "c":
            writer.refresh()
        else:
            count = remover.clear().count if everything else remover.remove(IDS[:1]).count
            assert count == there + everything
            removed, there = True, False
            assert writer.load(IDS[:1]) == [None]
        remover.refresh()
        assert remover.lookup(IDS) == there
    assert writer.store(ENTRIES[:1]).count == 1, "what is made after the removal is a new block"
    writer.close()
    remover.close()


def test_a_removal_of_damaged_bytes_does_not_refuse_a_good_copy(tmp_path: Path) -> None:
    writer, remover = opened(tmp_path), opened(tmp_path)
    writer.store(ENTRIES[:2])
    remover.refresh()
    seen = writer.removals_seen
    assert remover.remove(IDS[:1], remember=False).count == 1
    assert writer.load(IDS[:1]) == [None]
    assert writer.store(ENTRIES[:1], seen=seen).count == 1
    writer.close()
    remover.close()


def test_removals_that_are_forgotten_refuse_all_that_is_older(tmp_path: Path) -> None:
    writer, remover = opened(tmp_path), opened(tmp_path)
    writer.store(ENTRIES[5:])
    remover.refresh()
    seen = writer.removals_seen
    remover.remove([f"{index}".encode().ljust(32) for index in range(1025)])
    assert writer.store(ENTRIES[:2], seen=seen).count == 0
    assert writer.stats().skipped == {"removed meanwhile": 2}
    assert writer.store(ENTRIES[:2]).count == 2
    writer.close()
    remover.close()


def test_a_record_larger_than_the_slots_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tier = opened(tmp_path)
        tier.store(ENTRIES[:1])
    assert caplog.messages == [f"shm tier: 100 slots of {SLOT} bytes, 0 in use"]
    assert tier.store([TierEntry(IDS[1], "", b"x" * (SLOT + 1))]).count == 0
    assert tier.store([TierEntry(IDS[1], "o" * 129, b"x")]).count == 0
    assert tier.stats().skipped == {"too large": 1, "owner's name too long": 1}
    tier.close()


def test_a_damaged_record_is_refused_and_removed(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    manager = TierManager([tier], namespace=NAMESPACE, queue_bytes=LARGE)
    manager.offload([OffloadedBlock(block) for block in BLOCKS])
    assert manager.flush(DEADLINE)
    data = tier._path.read_bytes()
    at = data.index(ENTRIES[0].data) + 150
    with tier._path.open("r+b") as file:
        file.seek(at)
        file.write(b"damage")
    found: list[object] = []
    manager.onboard(IDS, manager.find(IDS), found.extend)
    eventually(lambda: bool(found))
    assert found[0] is None
    eventually(lambda: manager.stats()["shm"].corrupt == {"checksum": 1})
    assert tier.lookup(IDS[:1]) == 0
    assert manager.close(DEADLINE)
