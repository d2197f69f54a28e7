"""A process that stores and loads in a folder until it is killed. It checks what it is given and reports its progress.

    python -m tests.tiers.killed_process FOLDER SEED KIND

KIND is the tier in the folder: disk, or shm. A line after each operation; the last one says ``wrong`` if anything was
served that was never stored.
"""

import random
import sys
from pathlib import Path

from emberkv.tiers.base import Tier
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.manager import OffloadedBlock, TierManager
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.shm.tier import ShmTier
from tests.tiers.build import NAMESPACE, block_hashes, fetched, inexact, records

CHAINS = [records(12, seed=seed, payload_bytes=40_000) for seed in range(6)]
ROUNDED = [[inexact(record) for record in chain] for chain in CHAINS]
QUOTA = 2_000_000
"""Two thirds of all, so that storing evicts."""


def open_stack(folder: Path, kind: str = "disk") -> TierManager:
    tiers: tuple[Tier, Tier] = (
        MemoryTier(200_000),
        DiskTier.open(folder, QUOTA, namespace=NAMESPACE)
        if kind == "disk"
        else ShmTier.open(QUOTA, namespace=NAMESPACE, folder=folder),
    )
    return TierManager(tiers, namespace=NAMESPACE, queue_bytes=1_000_000)


def served_right(stack: TierManager, number: int) -> bool:
    """Whether all that comes of a chain is what was once stored."""
    found = fetched(stack, CHAINS[number])
    expected = zip(CHAINS[number], ROUNDED[number], strict=True)
    return all(record is None or record in pair for record, pair in zip(found, expected, strict=True))


def main() -> None:
    folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    stack = open_stack(folder, sys.argv[3])
    while True:
        number = rng.randrange(len(CHAINS))
        action = rng.random()
        if action < 0.5:
            chain = rng.choice((CHAINS, ROUNDED))[number]
            stack.offload([OffloadedBlock(record, f"owner {number}") for record in chain[: rng.randint(1, 12)]])
        elif action < 0.55:
            stack.remove(block_hashes(CHAINS[number][rng.randrange(12) :]))
        elif not served_right(stack, number):
            print("wrong", flush=True)
            return
        print("fine", flush=True)


if __name__ == "__main__":
    main()
