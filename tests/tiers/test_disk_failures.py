"""What can happen to a disk and its files: each with its outcome, and never an exception or a wrong byte."""

import errno
import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberkv.tiers.base import RemovalResult
from emberkv.tiers.disk.tier import DiskTier
from tests.tiers.build import NAMESPACE, block_hashes, entries, records
from tests.tiers.disks import FailingFiles, files_of, opened, others_of, path_of, stored
from tests.waiting import DEADLINE

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
SIZE = len(ENTRIES[0].data)


@pytest.fixture
def files(tmp_path: Path) -> FailingFiles:
    return FailingFiles(tmp_path)


@pytest.fixture
def tier(tmp_path: Path, files: FailingFiles) -> Iterator[DiskTier]:
    tier = opened(tmp_path, 4 * SIZE, files=files)
    yield tier
    tier.close()


def test_a_file_that_has_vanished_is_a_miss(tmp_path: Path, tier: DiskTier) -> None:
    tier.store(ENTRIES[:2])
    path_of(tmp_path, IDS[0]).unlink()
    assert tier.load(IDS[:2]) == [None, ENTRIES[1]]
    assert (tier.lookup(IDS[:1]), tier.stats().bytes, tier.stats().errors) == (0, SIZE, {"vanished": 1})


def test_a_file_that_vanished_before_a_touch_is_found_out(tmp_path: Path, tier: DiskTier) -> None:
    tier.store(ENTRIES[:2])
    path_of(tmp_path, IDS[0]).unlink()
    tier.touch(IDS[:2])
    assert (tier.lookup(IDS[:1]), tier.stats().errors) == (0, {"vanished": 1})


def test_a_whole_folder_that_has_vanished_with_its_lock_is_not_made_again(tmp_path: Path, tier: DiskTier) -> None:
    tier.store(ENTRIES[:2])
    shutil.rmtree(tmp_path / "blocks")
    assert tier.load(IDS[:2]) == [None, None]
    assert tier.store(ENTRIES[:2]).count == 0
    assert tier.stats().errors == {"vanished": 2, "write failed": 2}
    assert list(tmp_path.iterdir()) == []


def test_a_model_s_folder_that_has_vanished_is_made_again(tmp_path: Path, tier: DiskTier) -> None:
    tier.store(ENTRIES[:2])
    shutil.rmtree(tmp_path / "blocks" / NAMESPACE.hex())
    assert tier.load(IDS[:2]) == [None, None]
    assert tier.store(ENTRIES[:2]).count == 2
    assert tier.load(IDS[:2]) == ENTRIES[:2]


def test_a_file_that_cannot_be_read_is_passed_over_until_it_is_stored_again(
    tier: DiskTier, files: FailingFiles
) -> None:
    tier.store(ENTRIES[:2])
    files.fails = "read"
    assert tier.load(IDS[:1]) == [None]
    files.fails = ""
    assert (tier.lookup(IDS[:2]), tier.load(IDS[:1]), tier.lookup(IDS[1:2])) == (0, [None], 1)
    stats = tier.stats()
    assert (stats.entries, stats.bytes, stats.errors) == (2, 2 * SIZE, {"unreadable": 1})
    assert tier.store(ENTRIES[:1]).count == 1
    assert (tier.load(IDS[:2]), tier.stats().bytes) == (ENTRIES[:2], 2 * SIZE)


def test_a_file_that_cannot_be_read_is_evicted_in_its_turn(tmp_path: Path, tier: DiskTier, files: FailingFiles) -> None:
    tier.store([ENTRIES[0]])
    files.fails = "read"
    tier.load(IDS[:1])
    for entry in ENTRIES[1:5]:
        tier.store([entry])
    assert (tier.stats().entries, len(files_of(tmp_path))) == (4, 4)
    assert tier.lookup(IDS[1:5]) == 4


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "disk full"), (errno.EIO, "write failed")]
)
def test_a_write_that_fails_is_skipped_and_leaves_nothing(
    tmp_path: Path, tier: DiskTier, files: FailingFiles, error: int, kind: str
) -> None:
    tier.store(ENTRIES[:2])
    files.fails, files.error = "write", error
    assert tier.store([ENTRIES[2]]).count == 0
    stats = tier.stats()
    assert (stats.skipped, stats.errors) == ({kind: 1}, {kind: 1})
    assert (stats.entries, stats.bytes, others_of(tmp_path)) == (2, 2 * SIZE, [])
    files.fails = ""
    assert tier.store(ENTRIES[2:4]).count == 2
    assert tier.load(IDS[:4]) == ENTRIES[:4]


def test_failures_do_not_add_up_to_a_full_tier(tier: DiskTier, files: FailingFiles) -> None:
    files.fails = "write"
    for _ in range(3):
        tier.store(ENTRIES)
    files.fails = ""
    for entry in ENTRIES[:4]:
        assert tier.store([entry]).evicted == []
    assert tier.stats().bytes == 4 * SIZE


def test_times_that_cannot_be_written_cost_nothing_but_the_order(tier: DiskTier, files: FailingFiles) -> None:
    tier.store(ENTRIES[:2])
    files.fails, files.error = "stamp", errno.EPERM
    assert tier.load(IDS[:2]) == ENTRIES[:2]
    assert tier.stats().errors == {"time not written": 2}


def test_a_file_that_cannot_be_removed_is_counted(tier: DiskTier, files: FailingFiles) -> None:
    tier.store(ENTRIES[:2])
    files.fails, files.error = "unlink", errno.EACCES
    assert tier.remove(IDS[:1]) == RemovalResult(0, 1, "not removed: Permission denied")
    stats = tier.stats()
    assert (tier.lookup(IDS[:1]), stats.entries, stats.errors) == (0, 2, {"not removed": 1})


def test_a_folder_that_cannot_be_written_is_read_from(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES[:3])
    files = FailingFiles(tmp_path)
    files.fails, files.error = "lock", errno.EROFS
    before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
    tier = opened(tmp_path, files=files)
    assert tier.read_only == "folder cannot be written"
    assert tier.load(IDS[:3]) == ENTRIES[:3]
    assert tier.store(ENTRIES[3:5]).count == 0
    assert tier.stats().skipped == {"folder cannot be written": 2}
    assert tier.stats().errors == {"folder cannot be written": 1}
    assert {path: path.stat().st_mtime_ns for path in files_of(tmp_path)} == before


def test_nothing_is_stored_after_close(tmp_path: Path, tier: DiskTier) -> None:
    tier.close()
    assert tier.store(ENTRIES[:1]).count == 0
    assert tier.stats().skipped == {"closed": 1}
    assert files_of(tmp_path) == []


def hold_open(
    folder: Path, opened_event: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event"
) -> None:
    tier = opened(folder)
    tier.store(ENTRIES[:3])
    opened_event.set()
    done.wait(DEADLINE)


def test_the_second_process_on_a_folder_loads_and_does_not_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_open, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(DEADLINE)
    tier = opened(tmp_path, 2 * SIZE)
    assert tier.read_only == "another process writes here"
    assert tier.load(IDS[:2]) == ENTRIES[:2]
    assert tier.store(ENTRIES[3:4]).count == 0
    assert tier.stats().skipped == {"another process writes here": 1}
    assert tier.remove(IDS[:1]) == RemovalResult(0, 1, "another process writes here")
    assert (tier.lookup(IDS[:1]), len(files_of(tmp_path))) == (0, 3)
    done.set()
    other.join(DEADLINE)
    assert other.exitcode == 0
    assert opened(tmp_path).read_only is None


def test_a_log_line_names_neither_owner_nor_block(
    tmp_path: Path, tier: DiskTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier.store(entries(BLOCKS[:2], owner="somebody"))
    for path in files_of(tmp_path):
        path.unlink()
    with caplog.at_level(logging.DEBUG):
        tier.load(IDS[:2])
    assert caplog.messages == [
        "disk tier: vanished (No such file or directory), 1 so far",
        "disk tier: vanished (No such file or directory), 2 so far",
    ]


def test_a_failing_disk_does_not_flood_the_log(
    tier: DiskTier, files: FailingFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.fails = "write"
    for _ in range(20):
        tier.store(ENTRIES[:1])
    assert [message.split()[-3] for message in caplog.messages] == ["1", "2", "4", "8", "16"]
