"""The stack: down in the background, up verified, across tiers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from emberkv.core.promotion import Run
from emberkv.tiers.disk import DiskTier
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.stack import Offer, TierStack
from tests.tiers.build import NAMESPACE, PATIENCE, fetched, identities, records


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[TierStack]:
    tiers = (MemoryTier(10_000), DiskTier.open(tmp_path, 1_000_000, namespace=NAMESPACE))
    made = TierStack(tiers, namespace=NAMESPACE, queue_bytes=1_000_000)
    yield made
    made.close(PATIENCE)


def test_what_is_offered_is_found_and_fetched(stack: TierStack) -> None:
    blocks = records(20)
    stack.offer([Offer(each) for each in blocks])
    assert stack.flush(PATIENCE)
    assert sum(run.count for run in stack.find(identities(blocks))) == 20
    assert fetched(stack, blocks) == blocks


def test_after_a_restart_blocks_come_from_disk_and_then_from_ram(tmp_path: Path) -> None:
    blocks = records(20)
    for round in range(2):
        tiers = (MemoryTier(100_000), DiskTier.open(tmp_path, 1_000_000, namespace=NAMESPACE))
        stack = TierStack(tiers, namespace=NAMESPACE, queue_bytes=1_000_000)
        if round == 0:
            stack.offer([Offer(each) for each in blocks])
            assert stack.close(PATIENCE)
    assert stack.find(identities(blocks)) == [Run("disk", 20, None)]
    assert fetched(stack, blocks) == blocks
    assert stack.flush(PATIENCE)
    assert [(run.tier, run.count) for run in stack.find(identities(blocks))] == [("ram", 20)]
    assert stack.stats()["disk"].loads == 20
    assert stack.close(PATIENCE)
