"""The disk tier's folder: what is in it, who may read it, and what the next process finds there."""

import os
import stat
from pathlib import Path

import pytest

from emberkv.errors import CacheFolderError, ConfigError
from emberkv.tiers.base import RemovalResult
from emberkv.tiers.disk.files import BlockFile, owner_folder, owner_of, scan
from emberkv.tiers.disk.tier import DiskTier
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, inexact, records
from tests.tiers.disks import files_of, leave_temporary, opened, others_of, stored

BLOCKS = records(12)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)
SIZE = len(ENTRIES[0].data)


def found(tier: DiskTier) -> list[int]:
    return [index for index, block_hash in enumerate(IDS) if tier.lookup([block_hash])]


def modes(folder: Path) -> set[str]:
    return {stat.filemode(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_the_next_process_finds_what_is_there(tmp_path: Path) -> None:
    stored(tmp_path, entries(BLOCKS[:2], owner="one") + entries(BLOCKS[2:5], owner="two"))
    tier = opened(tmp_path)
    assert tier.read_only is None
    assert tier.load(IDS[:6]) == [*entries(BLOCKS[:2], owner="one"), *entries(BLOCKS[2:5], owner="two"), None]
    assert (tier.stats().entries, tier.stats().bytes) == (5, 5 * SIZE)
    assert tier.stats().bytes_by_owner == {"one": 2 * SIZE, "two": 3 * SIZE}


def test_exactness_survives(tmp_path: Path) -> None:
    stored(tmp_path, [ENTRIES[0], *entries([inexact(BLOCKS[1])])])
    tier = opened(tmp_path)
    assert (tier.lookup(IDS[:2]), tier.lookup(IDS[:2], exact=True)) == (2, 1)


def test_names_are_all_that_opening_needs(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES)
    for path in files_of(tmp_path):
        path.chmod(0)
        path.write_bytes(b"") if os.geteuid() else os.truncate(path, 0)
    assert found(opened(tmp_path)) == list(range(12))


def test_everything_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    stored(folder, ENTRIES[:1])
    assert modes(folder) == {"drwx------", "-rw-------"}


def test_a_folder_of_blocks_that_others_could_read_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir(mode=0o755)
    stored(tmp_path, [])
    assert stat.S_IMODE((tmp_path / "blocks").stat().st_mode) == 0o700


def test_a_file_is_replaced_in_one_step_and_nothing_else_is_left(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES)
    assert len(files_of(tmp_path)) == 12
    assert others_of(tmp_path) == []


def test_what_an_interrupted_writer_left_is_removed(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES[:2])
    leave_temporary(tmp_path, "7", ENTRIES[3].data[:100])
    tier = opened(tmp_path)
    assert others_of(tmp_path) == []
    assert found(tier) == [0, 1]


def test_of_two_files_of_one_block_the_exact_one_stays(tmp_path: Path) -> None:
    stored(tmp_path, entries([inexact(BLOCKS[0])]))
    (rounded,) = files_of(tmp_path)
    kept = rounded.read_bytes()
    stored(tmp_path, ENTRIES[:1])
    rounded.write_bytes(kept)
    tier = opened(tmp_path)
    assert tier.load(IDS[:1]) == ENTRIES[:1]
    assert not rounded.exists()
    assert (tier.stats().entries, tier.stats().bytes) == (1, SIZE)


def test_of_two_owners_files_of_one_block_the_more_recent_one_stays(tmp_path: Path) -> None:
    stored(tmp_path, entries(BLOCKS[:1], owner="old"))
    (old,) = files_of(tmp_path)
    new = old.parent.parent / owner_folder("new") / old.name
    new.parent.mkdir()
    new.write_bytes(old.read_bytes())
    os.utime(old, ns=(10, 10))
    assert opened(tmp_path).load(IDS[:1]) == entries(BLOCKS[:1], owner="new")
    assert files_of(tmp_path) == [new]


def test_recency_survives_whatever_the_clock_does(tmp_path: Path) -> None:
    times = iter([9_000, 8_000, 7_000, 6_000, 5_000])
    tier = DiskTier.open(tmp_path, 3 * SIZE, namespace=NAMESPACE, wall_ns=lambda: next(times))
    for entry in ENTRIES[:3]:
        tier.store([entry])
    tier.load(IDS[:1])
    tier.touch(IDS[1:2])
    tier.close()
    tier = DiskTier.open(tmp_path, 3 * SIZE, namespace=NAMESPACE, wall_ns=lambda: 0)
    for victim, entry in zip((2, 0, 1), ENTRIES[3:6], strict=True):
        assert tier.store([entry]).evicted == [IDS[victim]]


@pytest.mark.parametrize("verb", ["load", "touch"])
def test_of_a_batch_the_first_block_stays_longest_after_a_restart_too(tmp_path: Path, verb: str) -> None:
    stored(tmp_path, ENTRIES[:4])
    tier = opened(tmp_path)
    getattr(tier, verb)(IDS[:4])
    tier.close()
    assert found(opened(tmp_path, 2 * SIZE)) == [0, 1]
    assert len(files_of(tmp_path)) == 2


def test_other_models_never_match_but_count_and_are_evicted_in_their_turn(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES[:1])
    stored(tmp_path, entries(BLOCKS[:4], namespace=OTHER), namespace=OTHER)
    tier = opened(tmp_path, 6 * SIZE)
    assert tier.load(IDS[:4]) == [ENTRIES[0], None, None, None]
    assert (tier.stats().entries, tier.stats().bytes) == (5, 5 * SIZE)
    gone = [tier.store([entry]).evicted for entry in ENTRIES[4:8]]
    assert gone == [[], [], [], []]  # only the other model's went
    assert (tier.stats().evictions, tier.stats().bytes) == (3, 6 * SIZE)
    tier.close()
    assert opened(tmp_path, namespace=OTHER).lookup(IDS[3:4]) == 1


def test_clear_leaves_other_models_alone(tmp_path: Path) -> None:
    stored(tmp_path, entries(BLOCKS[:2], namespace=OTHER), namespace=OTHER)
    tier = opened(tmp_path)
    tier.store(ENTRIES[:3])
    assert tier.clear() == RemovalResult(3)
    assert (tier.stats().entries, len(files_of(tmp_path))) == (2, 2)


def test_names_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES[:1])
    (block,) = files_of(tmp_path)
    strangers = [
        tmp_path / "prompts.json",
        tmp_path / "blocks" / "README",
        tmp_path / "blocks" / "not-hex" / "@" / block.name,
        tmp_path / "blocks" / "abcd" / "owner" / block.name,
        block.parent / "notes.txt",
        block.parent / "xyz.kv",
        block.parent / ".kv",
        block.with_suffix(".other.kv"),
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    (block.parent / f"{'ab' * 32}.kv").symlink_to(block)
    (block.parent / f"{'cd' * 32}.kv").mkdir()
    tier = opened(tmp_path, SIZE)
    assert tier.stats().entries == 1
    assert tier.store(ENTRIES[1:2]).count == 1
    assert tier.clear() == RemovalResult(1)
    assert (block.parent / f"{'ab' * 32}.kv").is_symlink()
    assert (block.parent / f"{'cd' * 32}.kv").is_dir()
    assert [path.read_bytes() for path in strangers] == [b"mine"] * len(strangers)


def test_a_smaller_quota_binds_from_the_start(tmp_path: Path) -> None:
    stored(tmp_path, ENTRIES)
    tier = opened(tmp_path, 5 * SIZE + 1)
    assert found(tier) == [7, 8, 9, 10, 11]
    assert tier.stats().bytes == 5 * SIZE == sum(path.stat().st_size for path in files_of(tmp_path))


@pytest.mark.parametrize("owner", ["", "alice", "Alice", "a/b", "..", "@", "ü", "鍵 🔑", "%41", "x" * 199])
def test_an_owner_is_read_from_its_folder_again(owner: str) -> None:
    name = owner_folder(owner)
    assert owner_of(name) == owner
    assert name == name.lower()
    assert "/" not in name
    assert name.strip(".")


def test_owners_that_differ_in_case_have_folders_that_differ_in_more() -> None:
    assert owner_folder("alice").lower() != owner_folder("Alice").lower()


def test_an_owner_too_long_for_a_folder_is_skipped(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    assert tier.store(entries(BLOCKS[:1], owner="ü" * 100)).count == 0
    assert tier.stats().skipped == {"owner's name too long": 1}


def test_scan_tells_what_a_name_says(tmp_path: Path) -> None:
    stored(tmp_path, entries([inexact(BLOCKS[0])], owner="me"))
    (path,) = files_of(tmp_path)
    os.utime(path, ns=(5, 7))
    (file,) = scan(tmp_path / "blocks")
    assert file == BlockFile(NAMESPACE, IDS[0], "me", False, SIZE, 7)
    assert tmp_path / "blocks" / file.path == path


@pytest.mark.parametrize(("max_bytes", "namespace"), [(0, b"n"), (-1, b"n"), (1, b""), (1, b"n" * 65)])
def test_settings_that_cannot_be(tmp_path: Path, max_bytes: int, namespace: bytes) -> None:
    with pytest.raises(ConfigError):
        DiskTier.open(tmp_path, max_bytes, namespace=namespace)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheFolderError, match="cannot be used"):
        opened(tmp_path / "file")
