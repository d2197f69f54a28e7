"""Tiers that processes share, beside the RAM tier: how long a block takes to store and to load, verified.

    python -m benchmarks.shared_tiers [--block-mb 1] [--blocks 128] [--rounds 5] [--out PREFIX]

Blocks are loaded in the pieces that a manager reads, by one thread, and verified as the manager does. The disk tier
reads from the page cache. The server of the remote tier is started here, and asked over the loopback interface; without
redis-server or valkey-server it is left out. Two workers of one machine that asked one another over HTTP would take the
remote tier's way, with a copy through the kernel that shared memory does without.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import arguments, report
from benchmarks.figures import Figure

from emberkv.core.hashing import TokenChain
from emberkv.tiers.base import Tier, TierEntry
from emberkv.tiers.codec import BlockRecord, encode_record, verified_record
from emberkv.tiers.disk.tier import DiskTier
from emberkv.tiers.memory import MemoryTier
from emberkv.tiers.onboarding import PIECE_BLOCKS
from emberkv.tiers.remote.server import ServerAddress
from emberkv.tiers.remote.tier import RemoteTier
from emberkv.tiers.shm.tier import ShmTier

NAMESPACE = b"shared tiers benchmark".ljust(32)
BLOCK_TOKENS = 16
STORED_AT_ONCE = 32


def chain(count: int, block_bytes: int) -> list[TierEntry]:
    hashes = TokenChain(NAMESPACE, list(range(count * BLOCK_TOKENS)), BLOCK_TOKENS)
    return [
        TierEntry(
            block_hash,
            "",
            encode_record(
                BlockRecord(
                    block_hash, hashes.parent(at), hashes.block_tokens(at), at, exact=True,
                    payload=at.to_bytes(8, "little") * (block_bytes // 8),
                ),
                namespace=NAMESPACE,
            ),
        )
        for at, block_hash in enumerate(hashes.block_hashes)
    ]  # fmt: skip


@contextmanager
def server(program: str) -> Iterator[ServerAddress]:
    """A server on a free port of the loopback interface, which keeps nothing on disk."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield ServerAddress(f"redis://127.0.0.1:{port}")
        finally:
            process.terminate()


def tiers(stack: ExitStack, capacity: int) -> dict[str, Tier]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    made: dict[str, Tier] = {
        "RAM": MemoryTier(capacity),
        "shared memory": ShmTier.open(capacity, namespace=NAMESPACE),
        "disk, page cache": DiskTier.open(folder, capacity, namespace=NAMESPACE),
    }
    if program := shutil.which("redis-server") or shutil.which("valkey-server"):
        address = stack.enter_context(server(program))
        made["Redis, loopback"] = RemoteTier.open(address, capacity, namespace=NAMESPACE)
    for tier in made.values():
        stack.callback(tier.close)
    return made


def seconds_to_store(tier: Tier, entries: Sequence[TierEntry]) -> float:
    tier.clear()
    began = time.perf_counter()
    for start in range(0, len(entries), STORED_AT_ONCE):
        batch = entries[start : start + STORED_AT_ONCE]
        assert tier.store(batch).count == len(batch)
    return time.perf_counter() - began


def seconds_to_load(tier: Tier, entries: Sequence[TierEntry]) -> float:
    hashes = [entry.block_hash for entry in entries]
    began = time.perf_counter()
    for start in range(0, len(hashes), PIECE_BLOCKS):
        for entry in tier.load(hashes[start : start + PIECE_BLOCKS]):
            assert entry is not None
            verified_record(entry.data, namespace=NAMESPACE, block_hash=entry.block_hash, exact=True)
    return time.perf_counter() - began


def measure(block_bytes: int, count: int, rounds: int) -> list[Figure]:
    entries = chain(count, block_bytes)
    size = sum(len(entry.data) for entry in entries)
    figures: list[Figure] = []
    with ExitStack() as stack:
        for name, tier in tiers(stack, 2 * size).items():
            seconds_to_store(tier, entries)  # memory that is touched for the first time
            for verb, timed in (("store", seconds_to_store), ("load", seconds_to_load)):
                taken = [timed(tier, entries) for _ in range(rounds)]
                figures += [
                    Figure(f"{name}: {verb}", "GB/s", [size / each / 1e9 for each in taken], at_least=True),
                    Figure(f"{name}: {verb}", "us a block", [each / count * 1e6 for each in taken]),
                ]
    return figures


def main() -> int:
    parser = arguments.parser(__doc__, rounds=5)
    parser.add_argument("--block-mb", type=float, default=1.0, help="MB (2**20 bytes) of a block's state")
    parser.add_argument("--blocks", type=int, default=128)
    given = parser.parse_args()
    about = report.about(
        "benchmarks.shared_tiers", __doc__, block_mb=given.block_mb, blocks=given.blocks, rounds=given.rounds
    )
    return report.publish(measure(int(given.block_mb * 2**20), given.blocks, given.rounds), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
