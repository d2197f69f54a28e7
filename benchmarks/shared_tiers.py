"""Tiers that processes share, beside the RAM tier: how long a block takes to store and to load, verified.

    python -m benchmarks.shared_tiers [--block-mb 1] [--blocks 128] [--rounds 5] [--out PREFIX]

Blocks are loaded in the pieces that a manager reads, by one thread, and verified as the manager does. The disk tier
reads from the page cache. The server of the remote tier is started here, and asked over the loopback interface; without
redis-server or valkey-server it is left out. HTTP is what workers of one machine could do instead of sharing memory: a
process that has the records in memory sends a piece of them for each request.
"""

import multiprocessing
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
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
        made["Redis, loopback"] = RemoteTier(address, capacity, namespace=NAMESPACE).connect()
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


class Blocks(BaseHTTPRequestHandler):
    """Sends the records ``[START, STOP)`` for ``GET /START/STOP``."""

    protocol_version = "HTTP/1.1"
    entries: Sequence[TierEntry] = ()

    def do_GET(self) -> None:
        start, stop = map(int, self.path[1:].split("/"))
        wanted = self.entries[start:stop]
        self.send_response(200)
        self.send_header("Content-Length", str(sum(len(each.data) for each in wanted)))
        self.end_headers()
        for each in wanted:
            self.wfile.write(each.data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def serve(block_bytes: int, count: int, port: Connection) -> None:
    """A worker that others ask for its blocks."""
    Blocks.entries = chain(count, block_bytes)
    with ThreadingHTTPServer(("127.0.0.1", 0), Blocks) as listening:
        port.send(listening.server_port)
        listening.serve_forever()


def seconds_to_ask(client: httpx.Client, entries: Sequence[TierEntry]) -> float:
    began = time.perf_counter()
    for start in range(0, len(entries), PIECE_BLOCKS):
        wanted = entries[start : start + PIECE_BLOCKS]
        body, at = client.get(f"/{start}/{start + len(wanted)}").content, 0
        for entry in wanted:
            data = body[at : at + len(entry.data)]
            verified_record(data, namespace=NAMESPACE, block_hash=entry.block_hash, exact=True)
            at += len(data)
    return time.perf_counter() - began


def figures_of(name: str, taken: Sequence[float], entries: Sequence[TierEntry]) -> list[Figure]:
    size = sum(len(entry.data) for entry in entries)
    return [
        Figure(name, "GB/s", [size / each / 1e9 for each in taken], at_least=True),
        Figure(name, "us a block", [each / len(entries) * 1e6 for each in taken]),
    ]


def measure_http(block_bytes: int, entries: Sequence[TierEntry], rounds: int) -> list[Figure]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(block_bytes, len(entries), theirs), daemon=True)
    process.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ours.recv()}", timeout=60) as client:
            seconds_to_ask(client, entries)
            return figures_of("HTTP, loopback: load", [seconds_to_ask(client, entries) for _ in range(rounds)], entries)
    finally:
        process.terminate()
        process.join()


def measure(block_bytes: int, count: int, rounds: int) -> list[Figure]:
    entries = chain(count, block_bytes)
    size = sum(len(entry.data) for entry in entries)
    figures: list[Figure] = []
    with ExitStack() as stack:
        for name, tier in tiers(stack, 2 * size).items():
            seconds_to_store(tier, entries)  # memory that is touched for the first time
            for verb, timed in (("store", seconds_to_store), ("load", seconds_to_load)):
                figures += figures_of(f"{name}: {verb}", [timed(tier, entries) for _ in range(rounds)], entries)
    return figures + measure_http(block_bytes, entries, rounds)


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
