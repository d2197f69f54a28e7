"""Opening a disk tier: how long it takes to find what an earlier process left.

    python -m benchmarks.disk_open [--blocks 100000] [--rounds 5] [--folder FOLDER] [--out PREFIX]

Each round opens the folder in a process of its own, after its imports; names, sizes and times of the files are in the
kernel's caches, as after a server's restart, not as after a machine's. Blocks are small, as opening does not read them.
Exits with 1 when the target is missed.
"""

import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from benchmarks import arguments, report
from benchmarks.figures import Figure

from emberkv.tiers.base import TierEntry
from emberkv.tiers.disk.tier import DiskTier

SECONDS = 2.0
TARGET_BLOCKS = 100_000
OWNERS = 10
NAMESPACE = bytes(range(32))
QUOTA = 2**40

OPEN = f"""
import sys, time
from pathlib import Path
from emberkv.tiers.disk.tier import DiskTier
begin = time.perf_counter()
tier = DiskTier.open(Path(sys.argv[1]), {QUOTA}, namespace={NAMESPACE!r})
seconds = time.perf_counter() - begin
print(seconds, tier.stats().entries)
"""


def fill(folder: Path, blocks: int) -> None:
    tier = DiskTier.open(folder, QUOTA, namespace=NAMESPACE)
    for number in range(blocks):
        block_hash = sha256(number.to_bytes(8)).digest()
        tier.store([TierEntry(block_hash, f"tenant-{number % OWNERS}", block_hash)])
    assert tier.stats().entries == blocks
    tier.close()


def open_once(folder: Path, blocks: int) -> float:
    """Seconds."""
    printed = subprocess.run([sys.executable, "-c", OPEN, folder], capture_output=True, text=True, check=True).stdout
    seconds, entries = printed.split()
    assert int(entries) == blocks
    return float(seconds)


def measure(parent: Path | None, blocks: int, rounds: int) -> Figure:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        fill(Path(folder), blocks)
        seconds = [open_once(Path(folder), blocks) for _ in range(rounds)]
    return Figure(f"open a folder of {blocks:,} blocks", "s", seconds, SECONDS if blocks == TARGET_BLOCKS else None)


def main() -> int:
    parser = arguments.parser(__doc__, rounds=5)
    parser.add_argument("--blocks", type=int, default=TARGET_BLOCKS)
    parser.add_argument("--folder", type=Path, help="where the tier's folder is made; default: for temporary files")
    given = parser.parse_args()
    about = report.about("benchmarks.disk_open", __doc__, blocks=given.blocks, owners=OWNERS, rounds=given.rounds)
    return report.publish([measure(given.folder, given.blocks, given.rounds)], about, given.out)


if __name__ == "__main__":
    sys.exit(main())
