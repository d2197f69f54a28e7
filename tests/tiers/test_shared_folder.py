"""Several processes on one folder: they follow what one of them writes, and another takes over when that one ends."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emberkv.errors import CacheFolderError
from emberkv.tiers.base import RemovalResult
from emberkv.tiers.disk.files import BlockFile, BlockFiles
from emberkv.tiers.disk.index import JournalWriter
from tests.tiers.build import OTHER, block_hashes, entries, records
from tests.tiers.disks import files_of, opened, stored

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)


class CountingFiles(BlockFiles):
    """scans: how often the folder was listed. during_scan: called then. unreadable: it cannot be."""

    scans = 0
    unreadable = False
    during_scan: Callable[[], None] = staticmethod(lambda: None)

    def scan(self) -> Iterator[BlockFile]:
        self.scans += 1
        self.during_scan()
        if self.unreadable:
            raise CacheFolderError("it cannot be read")
        return super().scan()


def test_a_reader_follows_the_writer_without_listing_the_folder(tmp_path: Path) -> None:
    writer, files = opened(tmp_path), CountingFiles(tmp_path)
    reader = opened(tmp_path, files=files)
    assert reader.lookup(IDS) == 0
    writer.store(ENTRIES[:4])
    reader.refresh()
    assert reader.load(IDS[:5]) == [*ENTRIES[:4], None]
    assert reader.stats().bytes == writer.stats().bytes
    writer.remove(IDS[2:3])
    for _ in range(3):
        reader.refresh()
    assert [reader.lookup([each]) for each in IDS] == [1, 1, 0, 1, 0, 0]
    assert files.scans == 1
    assert reader.stats().errors == {}


def test_a_reader_takes_over_when_the_writer_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, reader = opened(tmp_path), opened(tmp_path)
    assert reader.store(ENTRIES[:1]).count == 0
    writer.store(ENTRIES[:2])
    writer.close()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        reader.refresh()
    assert reader.read_only is None
    assert caplog.messages == ["disk tier: this process writes to the folder, which has 2 blocks"]
    assert reader.store(ENTRIES[2:4]).count == 2
    assert opened(tmp_path).lookup(IDS) == 4


def test_what_a_reader_removes_is_not_served_by_it_and_goes_when_it_writes(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), opened(tmp_path)
    writer.store(ENTRIES[:4])
    assert reader.remove(IDS[:1]) == RemovalResult(0, 1, "another process writes here")
    assert reader.clear() == RemovalResult(0, 4, "another process writes here")
    reader.refresh()
    assert (reader.lookup(IDS), writer.lookup(IDS), len(files_of(tmp_path))) == (0, 4, 4)
    writer.store(ENTRIES[4:5])  # stored after the removal
    reader.refresh()
    assert reader.lookup(IDS[4:5]) == 1
    writer.close()
    reader.refresh()
    assert [path.name for path in files_of(tmp_path)] == [f"{IDS[4].hex()}.kv"]
    assert [reader.lookup([each]) for each in IDS] == [0, 0, 0, 0, 1, 0]


def test_a_folder_that_goes_and_comes_back_is_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache"
    tier = opened(folder)
    tier.store(ENTRIES[:2])
    folder.rename(tmp_path / "elsewhere")
    tier.refresh()
    assert tier.lookup(IDS) == 0
    assert tier.store(ENTRIES[2:3]).count == 0
    assert tier.stats().skipped == {"folder is gone": 1}
    assert not folder.exists()
    (tmp_path / "elsewhere").rename(folder)
    tier.refresh()
    assert tier.load(IDS[:2]) == ENTRIES[:2]
    assert tier.store(ENTRIES[2:3]).count == 1
    gone = "disk tier: folder is gone; nothing is loaded or stored until it is back"
    assert caplog.messages == [gone]


def test_a_journal_that_was_begun_anew_or_lost_has_readers_scan_again(tmp_path: Path) -> None:
    writer, files = opened(tmp_path), CountingFiles(tmp_path)
    reader = opened(tmp_path, files=files)
    writer.store(ENTRIES[:1])
    JournalWriter(tmp_path / "blocks").begin()
    reader.refresh()
    assert (files.scans, reader.lookup(IDS)) == (2, 1)
    (tmp_path / "blocks" / "journal").unlink()
    for _ in range(3):
        reader.refresh()
    assert (files.scans, reader.lookup(IDS)) == (2, 1)
    writer.store(ENTRIES[1:2])
    reader.refresh()
    assert (files.scans, reader.lookup(IDS)) == (3, 2)
    os.truncate(tmp_path / "blocks" / "journal", 3)
    writer.store(ENTRIES[2:4])
    os.truncate(tmp_path / "blocks" / "journal", 0)
    reader.refresh()
    assert (files.scans, reader.lookup(IDS)) == (4, 4)
    writer.store(ENTRIES[4:5])
    reader.refresh()
    assert (files.scans, reader.lookup(IDS)) == (4, 5)


def test_a_removal_outlasts_what_the_journal_said_before_it(tmp_path: Path) -> None:
    """The reader meets the new writer's journal, which says that the block was stored, when it removes the block."""
    first, reader = opened(tmp_path), opened(tmp_path)
    first.close()
    writer = opened(tmp_path)
    writer.store(ENTRIES[:2])
    assert reader.remove(IDS[:1]) == RemovalResult(0, 1, "another process writes here")
    for _ in range(2):
        reader.refresh()
    assert [reader.lookup([each]) for each in IDS[:2]] == [0, 1]


def test_a_reader_removes_though_it_cannot_read_the_folder(tmp_path: Path) -> None:
    writer, files = opened(tmp_path), CountingFiles(tmp_path)
    reader = opened(tmp_path, files=files)
    writer.store(ENTRIES[:2])
    reader.refresh()
    JournalWriter(tmp_path / "blocks").begin()
    files.unreadable = True
    assert reader.remove(IDS[:1]) == RemovalResult(0, 1, "another process writes here")
    files.unreadable = False
    reader.refresh()
    assert [reader.lookup([each]) for each in IDS[:2]] == [0, 1]
    assert reader.stats().errors == {"folder not read": 1}


def test_a_reader_follows_a_folder_that_was_moved_and_made_anew_between_two_looks(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    writer, reader = opened(folder), opened(folder)
    writer.store(ENTRIES[:1])
    reader.refresh()
    folder.rename(tmp_path / "elsewhere")
    opened(folder).store(ENTRIES[1:2])
    reader.refresh()
    assert [reader.lookup([each]) for each in IDS[:2]] == [0, 1]


def test_a_folder_that_cannot_be_read_is_not_written_and_has_no_lock(tmp_path: Path) -> None:
    """A process that writes without knowing what there is would exceed the quota for good."""
    first, files = opened(tmp_path), CountingFiles(tmp_path)
    reader = opened(tmp_path, files=files)
    first.store(ENTRIES[:2])
    first.close()
    files.unreadable = True
    for _ in range(2):
        reader.refresh()
    assert (reader.read_only, reader.store(ENTRIES[2:3]).count) == ("folder cannot be read", 0)
    with pytest.raises(CacheFolderError):
        opened(tmp_path, files=files)
    other = opened(tmp_path)
    assert other.read_only is None
    other.close()
    files.unreadable = False
    reader.refresh()
    assert (reader.read_only, reader.lookup(IDS)) == (None, 2)


def test_a_lock_that_the_file_system_does_not_have_costs_no_descriptors(tmp_path: Path) -> None:
    class NoLocks(BlockFiles):
        def take_lock(self, descriptor: int) -> None:
            taken.append(descriptor)
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    taken: list[int] = []
    tier = opened(tmp_path, files=NoLocks(tmp_path))
    tier.refresh()
    assert tier.read_only == "folder cannot be written"
    assert len(taken) == 2
    for descriptor in taken:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_tier_that_is_closed_while_it_takes_over_lets_go_of_the_folder(tmp_path: Path) -> None:
    first, files = opened(tmp_path), CountingFiles(tmp_path)
    reader = opened(tmp_path, files=files)
    first.close()
    files.during_scan = reader.close
    reader.refresh()
    assert reader.read_only == "closed"
    assert opened(tmp_path).read_only is None


def test_other_models_of_a_reader_s_folder_count_too(tmp_path: Path) -> None:
    writer = opened(tmp_path, namespace=OTHER)
    reader = opened(tmp_path)
    writer.store(entries(BLOCKS[:3], namespace=OTHER))
    reader.refresh()
    assert (reader.stats().entries, reader.lookup(IDS)) == (3, 0)


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES[:1])
    tmp_path.chmod(0o777)
    with pytest.raises(CacheFolderError, match=r"is not trusted: .* can be written by all users"):
        opened(tmp_path)


def test_links_and_folders_in_the_place_of_files_do_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    stored(folder, ENTRIES[:1])
    shutil.rmtree(folder / "blocks" / "tmp")
    (folder / "blocks" / "tmp").symlink_to(victim)
    assert opened(folder).read_only == "folder cannot be written"
    assert (victim / "file").exists()
    (folder / "blocks" / "tmp").unlink()
    (folder / "blocks" / "tmp" / "odd").mkdir(parents=True)
    (folder / "blocks" / "lock").unlink()
    (folder / "blocks" / "lock").mkdir()
    tier = opened(folder)
    assert (tier.read_only, tier.store(ENTRIES[1:2]).count) == (None, 1)
    assert "disk tier: 1 folders among the temporary files are left alone" in caplog.messages
    tier.close()
    (folder / "blocks" / "lock").unlink()
    (folder / "blocks" / "lock").symlink_to(tmp_path / "target")
    assert opened(folder).read_only == "folder cannot be written"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_in_a_block_s_place_is_passed_over_at_once(tmp_path: Path, make: object) -> None:
    assert callable(make)
    tier = opened(tmp_path)
    tier.store(ENTRIES[:2])
    path = next(path for path in files_of(tmp_path) if path.name.startswith(IDS[0].hex()))
    path.unlink()
    make(path)
    assert tier.load(IDS[:2]) == [None, ENTRIES[1]]
    assert tier.stats().errors == {"unreadable": 1}
