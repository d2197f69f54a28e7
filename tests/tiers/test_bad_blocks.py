"""Files that are not the block that their name says: refused, counted by what is wrong, and removed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emberkv.tiers.codec import MAGIC
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import TierManager
from tests.tiers.build import NAMESPACE, OTHER, block_hashes, entries, fetched, records
from tests.tiers.disks import opened, path_of
from tests.waiting import DEADLINE

BLOCKS = records(6)
ENTRIES = entries(BLOCKS)
IDS = block_hashes(BLOCKS)


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return opened(tmp_path)


@pytest.fixture
def stack(tier: DiskTier) -> Iterator[TierManager]:
    stack = TierManager([tier], namespace=NAMESPACE, queue_bytes=100_000)
    yield stack
    stack.close(DEADLINE)


def newer_version(data: bytes) -> bytes:
    return MAGIC + b"\x02\x00" + data[10:]


def another_model(data: bytes) -> bytes:
    return entries(BLOCKS[1:2], namespace=OTHER)[0].data


def another_block(data: bytes) -> bytes:
    return ENTRIES[5].data


def flipped(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 4]) + data[-49:]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (newer_version, "version"),
        (another_model, "namespace"),
        (another_block, "hash"),
        (flipped, "checksum"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: b"#!/bin/sh\n" * 100, "no block"),
    ],
)
def test_bytes_that_are_not_the_block_are_refused_counted_and_removed(
    tmp_path: Path, tier: DiskTier, stack: TierManager, damage: Callable[[bytes], bytes], fault: str
) -> None:
    tier.store(ENTRIES[:3])
    path = path_of(tmp_path, IDS[1])
    path.write_bytes(damage(path.read_bytes()))
    assert fetched(stack, BLOCKS[:3])[:2] == [BLOCKS[0], None]
    assert not path.exists()
    stats = stack.stats()["disk"]
    assert stats.corrupt == {fault: 1}
    assert stats.entries == 2
    assert tier.store(ENTRIES[1:2]).count == 1
    assert fetched(stack, BLOCKS[:3]) == BLOCKS[:3]


def test_a_rounded_block_under_an_exact_one_s_name_is_refused(
    tmp_path: Path, tier: DiskTier, stack: TierManager
) -> None:
    tier.store(ENTRIES[:1])
    path = path_of(tmp_path, IDS[0])
    path.write_bytes(entries(records(1, exact=False))[0].data)
    assert fetched(stack, BLOCKS[:1]) == [None]
    assert stack.stats()["disk"].corrupt == {"exactness": 1}
