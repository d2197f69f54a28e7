"""`emberkv cluster` on a real Ray, with real workers. It takes minutes, so only with --long."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import CheckpointFactory
from tests.e2e.process import clean_environment
from tests.machine import free_ports
from tests.waiting import DEADLINE, eventually

PROMPT = "zebra " * 40
START_SECONDS = 600.0


@dataclass
class Cluster:
    """A cluster that was started by the command, and its gateway."""

    home: Path
    port: int

    def command(self, *arguments: str) -> str:
        """What ``emberkv cluster`` prints; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "emberkv.cli.main", "cluster", *arguments],
            env=clean_environment() | {"HOME": str(self.home)},
            capture_output=True, text=True, check=False, timeout=START_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def workers(self) -> dict[str, Any]:
        listed = httpx.get(f"http://127.0.0.1:{self.port}/v1/cluster", timeout=DEADLINE).json()["workers"]
        return {worker["worker_id"]: worker for worker in listed if worker["status"] == "up"}

    def ask(self) -> httpx.Response:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=DEADLINE)


@pytest.fixture
def cluster(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory, long: bool) -> Iterator[Cluster]:
    if not long:
        pytest.skip("starts Ray and workers: --long")
    made = Cluster(tmp_path_factory.mktemp("home"), free_ports())
    made.command(
        "up", str(checkpoint("llama")), "--workers", "2", "--port", str(made.port), "--",
        "--served-name", "tiny", "--no-warmup",
    )  # fmt: skip
    try:
        yield made
    finally:
        made.command("down")


def test_workers_are_scaled_by_what_their_caches_are_worth_and_replaced_when_killed(cluster: Cluster) -> None:
    eventually(lambda: len(cluster.workers()) == 2)
    answers = [cluster.ask() for _ in range(2)]
    assert answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    warm = answers[1].headers["x-emberkv-route"].partition(";")[0].removeprefix("worker=")
    cluster.command("scale", "1")
    eventually(lambda: set(cluster.workers()) == {warm})
    cluster.command("scale", "2")
    eventually(lambda: len(cluster.workers()) == 2)
    url = cluster.workers()[warm]["url"]
    os.kill(process_at(url), signal.SIGKILL)
    eventually(lambda: cluster.workers().get(warm, {"url": url})["url"] != url)
    assert cluster.ask().json()["choices"] == answers[0].json()["choices"]


def process_at(url: str) -> int:
    """The worker that listens at ``url``."""
    port = httpx.URL(url).port
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if "emberkv.cli.supervised" in words and str(port) in words:
                return int(folder.name)
    raise AssertionError(f"no process listens at {url}")
