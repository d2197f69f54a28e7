"""A folder that the version before wrote, whose block hashes covered data types and kernels: left alone, never served.

``tests/data/tiers_2`` holds what that version stored for a prompt of the tokens 5 to 21, in blocks of 4.
"""

import os
import shutil
from pathlib import Path

import pytest

from emberkv.core.hashing import prompt_hashes
from emberkv.tiers.codec import verified_record
from emberkv.tiers.disk.files import BlockFile, BlockFiles, scan, verify
from emberkv.tiers.manager import TierManager
from tests.tiers.build import NAMESPACE, block_hashes, entries, fetched, records
from tests.tiers.disks import opened

WRITTEN = Path(__file__).parents[1] / "data" / "tiers_2"
FINGERPRINT = "9564aa26f1408a9296401279db0574aa"
TOKENS = range(5, 22)
BLOCKS = records(3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "cache"))


def earlier(folder: Path) -> list[BlockFile]:
    """The blocks of that version that are in a folder."""
    return [file for file in scan(folder / "blocks") if file.namespace != NAMESPACE]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.path: (folder / "blocks" / file.path).read_bytes() for file in earlier(folder)}


def test_they_are_sound_and_of_the_prompt(folder: Path) -> None:
    files = earlier(folder)
    read = BlockFiles(folder).read
    found = [verified_record(read(f.path), namespace=f.namespace, block_hash=f.block_hash, exact=True) for f in files]
    assert sorted(record.position for record in found) == [0, 1, 2, 3]


def test_the_same_prompt_and_weights_have_other_hashes_now(folder: Path) -> None:
    now = prompt_hashes(FINGERPRINT, TOKENS, block_size=4)
    assert (len(now), {file.block_hash for file in earlier(folder)} & set(now)) == (4, set())


def test_they_are_counted_and_not_found(folder: Path) -> None:
    tier = opened(folder)
    assert [tier.lookup([file.block_hash]) for file in earlier(folder)] == [0] * 4
    assert tier.stats().bytes == sum(file.size for file in earlier(folder))
    tier.close()


def test_new_blocks_lie_beside_them_and_no_byte_of_theirs_changes(folder: Path) -> None:
    before = contents(folder)
    tier = opened(folder)
    tier.store(entries(BLOCKS))
    tier.clear()
    tier.store(entries(BLOCKS[:2]))
    tier.close()
    again = opened(folder)
    assert (again.lookup(block_hashes(BLOCKS)), contents(folder)) == (2, before)
    again.close()
    assert [fault for _, fault in verify(BlockFiles(folder), earlier(folder))] == [None] * 4


def test_they_are_evicted_in_their_turn(folder: Path) -> None:
    for file in earlier(folder):
        os.utime(folder / "blocks" / file.path, (1, 1))
    new = entries(BLOCKS)
    tier = opened(folder, sum(len(entry.data) for entry in new))
    tier.store(new)
    assert (tier.lookup(block_hashes(BLOCKS)), earlier(folder)) == (3, [])
    tier.close()


def test_one_that_was_moved_to_where_a_block_of_ours_belongs_is_refused(folder: Path) -> None:
    tier = opened(folder)
    tier.store(entries(BLOCKS))
    tier.close()
    ours = folder / "blocks" / BlockFile(NAMESPACE, BLOCKS[1].block_hash, "", True, 0, 0).path
    shutil.copyfile(folder / "blocks" / earlier(folder)[0].path, ours)
    manager = TierManager([opened(folder)], namespace=NAMESPACE, queue_bytes=2**20)
    assert fetched(manager, BLOCKS) == [BLOCKS[0], None, BLOCKS[2]]
    stats = manager.stats()["disk"]
    manager.close(0.0)
    assert (stats.corrupt, len(earlier(folder)), ours.exists()) == ({"namespace": 1}, 4, False)
