"""A process killed at any moment leaves a folder that opens clean and in which every block is sound."""

import random
import subprocess
import sys
from pathlib import Path

from emberkv.tiers.disk.files import BlockFiles, scan, verify
from tests.tiers.disks import files_of, others_of
from tests.tiers.killed_process import CHAINS, QUOTA, open_stack, served_right
from tests.waiting import DEADLINE


def run_until_killed(folder: Path, seed: int, operations: int) -> None:
    command = [sys.executable, "-m", "tests.tiers.killed_process", str(folder), str(seed), "disk"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(operations)]
        process.kill()
    assert lines == ["fine\n"] * operations


def check_files(folder: Path) -> None:
    listed = list(scan(folder / "blocks"))
    assert list(verify(BlockFiles(folder), listed)) == [(file, None) for file in listed]


def test_kills_at_random_moments(tmp_path: Path, long: bool) -> None:
    rng = random.Random(20)
    interrupted = 0
    for seed in range(60 if long else 5):
        run_until_killed(tmp_path, seed, rng.randint(1, 60))
        interrupted += len(others_of(tmp_path))
        check_files(tmp_path)
        stack = open_stack(tmp_path)
        stats = stack.stats()["disk"]
        assert others_of(tmp_path) == []
        assert stats.bytes == sum(path.stat().st_size for path in files_of(tmp_path)) <= QUOTA
        assert all(served_right(stack, number) for number in range(len(CHAINS)))
        assert stack.close(DEADLINE)
        stats = stack.stats()["disk"]
        assert (stats.corrupt, stats.errors) == ({}, {})
    assert files_of(tmp_path)
    assert interrupted or not long, "no kill came in the middle of a write"
