"""A cluster as scripts/local_dev.sh runs it: real processes, asked as clients of a coordinator with workers ask."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from emberkv.tensors import deserialize_tensor, serialize_tensor
from tests.e2e.process import clean_environment, eventually

SCRIPT = Path(__file__).parents[2] / "scripts" / "local_dev.sh"
SECONDS = 250.0
STORY = "Once upon a time, in a valley between two mountains, there lived a clockmaker who never slept. " * 8


class LocalCluster:
    """What the script runs in ``folder``."""

    def __init__(self, folder: Path) -> None:
        first = free_ports(5)
        self.gateway, self.coordinator = f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"
        self.environment = {
            **clean_environment(),
            "LOCAL_DEV_DIR": str(folder),
            "LOCAL_DEV_EMBERKV": f"{sys.executable} -m emberkv.cli.main",
            "GATEWAY_PORT": str(first),
            "COORDINATOR_PORT": str(first + 1),
            "WORKER_PORT": str(first + 2),
            "CACHE_RAM": "64MiB",
        }
        self.client = httpx.Client(timeout=SECONDS)

    def run(self, *arguments: str, status: int = 0, **environment: str) -> str:
        answer = subprocess.run(
            [SCRIPT, *arguments], env=self.environment | environment,
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        assert answer.returncode == status, answer.stdout + answer.stderr
        return answer.stdout + answer.stderr

    def workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.coordinator}/workers").json()
        return found

    def generate(self, prompt: str, **fields: Any) -> tuple[list[dict[str, Any]], httpx.Headers]:
        """The events of a generation that succeeds, and its headers."""
        body = {"prompt": prompt, "max_tokens": 5, **fields}
        answer = self.client.post(f"{self.gateway}/generate", json=body)
        assert answer.status_code == 200, answer.text
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        assert [events[0]["type"], events[-1]["type"]] == ["start", "done"]
        return events, answer.headers


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free now."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        sockets = [socket.socket() for _ in range(count)]
        try:
            for at, each in enumerate(sockets):
                each.bind(("127.0.0.1", port + at))
        except (OSError, OverflowError):
            continue
        else:
            return port
        finally:
            for each in sockets:
                each.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path_factory.mktemp("local") / "cluster")
    try:
        cluster.run("start", WORKERS="2")
        yield cluster
    finally:
        cluster.run("stop")


def test_the_cluster_is_up(cluster: LocalCluster) -> None:
    assert set(cluster.workers()) == {"worker-0", "worker-1"}
    status = cluster.run("status")
    assert status.count('"status":"ok"') == 4
    assert '"service":"coordinator"' in status
    assert cluster.client.get(f"{cluster.gateway}/health").json() == {"status": "ok", "service": "gateway"}


def test_a_generation_streams_its_tokens(cluster: LocalCluster) -> None:
    (start, *tokens, done), _ = cluster.generate("Once upon a time", max_tokens=10, temperature=0.7)
    assert (start["prompt"], len(start["seq_id"])) == ("Once upon a time", 36)
    assert {frozenset(each) for each in tokens} == {frozenset({"type", "token", "token_id"})}
    assert done["generated_text"] == start["prompt"] + "".join(each["token"] for each in tokens)
    assert 1 <= done["tokens_generated"] == len(tokens) <= 10


def test_a_second_generation_finds_the_first_ones_prompt_cached_at_the_same_worker(cluster: LocalCluster) -> None:
    def ask() -> tuple[str, dict[str, str]]:
        events, headers = cluster.generate(STORY, seq_id="twice", temperature=0)
        cached = dict(each.split("=") for each in headers["x-emberkv-cache"].split(";"))
        route = dict(each.split("=") for each in headers["x-emberkv-route"].split(";"))
        return events[-1]["generated_text"], {"worker": route["worker"], "hit": cached["hit"], "miss": cached["miss"]}

    text, cold = ask()
    assert int(cold["miss"]) > 100
    again: list[dict[str, str]] = []

    def is_warm() -> bool:
        same, warm = ask()
        assert same == text
        again.append(warm)
        return int(warm["hit"]) >= int(cold["hit"]) + int(cold["miss"]) - 1

    eventually(is_warm)
    assert again[-1]["worker"] == cold["worker"]


def test_many_generations_at_once_all_succeed(cluster: LocalCluster) -> None:
    kinds = [(f"Question {number}: what is a list?", 5 * (number % 3 + 1)) for number in range(12)]
    temperatures = (0.1, 0.7, 1.0)
    with ThreadPoolExecutor(len(kinds)) as threads:
        futures = [
            threads.submit(cluster.generate, prompt, max_tokens=count, temperature=temperatures[count % 3])
            for prompt, count in kinds
        ]
        answers = [future.result()[0] for future in futures]
    for (_, most), events in zip(kinds, answers, strict=True):
        assert 1 <= events[-1]["tokens_generated"] <= most


def test_statistics_add_up_what_was_generated_and_stored(cluster: LocalCluster) -> None:
    def stats() -> dict[str, Any]:
        found: dict[str, Any] = cluster.client.get(f"{cluster.gateway}/stats").json()
        assert found["cluster_healthy"]
        assert all(each["prefix_cache"]["used_bytes"] <= each["prefix_cache"]["max_bytes"] for each in found["workers"])
        return found

    before = stats()
    for number in range(3):
        cluster.generate(f"Sequence {number}")
    cluster.client.post(f"{cluster.gateway}/kv/put", json={"seq_id": "counted", "layer": 0, **layer()})
    after = stats()
    assert after["total_sequences"] - before["total_sequences"] == 4
    assert after["total_kv_entries"] - before["total_kv_entries"] == 1


def layer() -> dict[str, Any]:
    return {name: serialize_tensor(torch.randn(5, 12, 64)) for name in ("k", "v")}


def test_tensors_land_on_the_worker_that_the_coordinator_names(cluster: LocalCluster) -> None:
    for number in range(6):
        name, given = f"local-{number}", layer()
        route = cluster.client.get(f"{cluster.coordinator}/kv/route/{name}").json()
        put = cluster.client.post(f"{cluster.gateway}/kv/put", json={"seq_id": name, "layer": 0, **given}).json()
        assert put["worker_id"] == route["worker_id"]
        found = cluster.client.post(f"{cluster.gateway}/kv/get", json={"seq_id": name, "layer": 0}).json()
        assert torch.equal(
            deserialize_tensor(found["k"], library="torch"), deserialize_tensor(given["k"], library="torch")
        )
        length = cluster.client.get(f"{route['address']}/kv/{name}/0/length").json()
        assert length["seq_len"] == 5
        assert cluster.client.delete(f"{route['address']}/kv/{name}").json()["status"] == "evicted"
        gone = cluster.client.post(f"{cluster.gateway}/kv/get", json={"seq_id": name, "layer": 0})
        assert gone.status_code == 404


def test_workers_that_are_scaled_away_leave_the_ring(cluster: LocalCluster) -> None:
    cluster.run("scale-workers", "1")
    eventually(lambda: set(cluster.workers()) == {"worker-0"})
    for number in range(5):
        route = cluster.client.get(f"{cluster.coordinator}/kv/route/{number}").json()
        assert route["worker_id"] == "worker-0"
        cluster.generate(f"After scaling {number}")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 0, "usage:"),
        (("help",), 0, "usage:"),
        (("--help",), 0, "usage:"),
        (("-h",), 0, "usage:"),
        (("scale-workers",), 1, "name the number of workers"),
        (("shell",), 1, "name a service"),
        (("dance",), 1, "Unknown command: dance"),
    ],
)
def test_commands_say_what_they_need(tmp_path: Path, arguments: tuple[str, ...], status: int, text: str) -> None:
    environment = {**os.environ, "LOCAL_DEV_DIR": str(tmp_path / "none")}
    answer = subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == status
    assert text in answer.stdout + answer.stderr
