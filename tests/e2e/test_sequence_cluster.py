"""Two workers and a gateway with --kv-routes, as processes, asked as clients of a coordinator with workers ask."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from emberkv.tensors import deserialize_tensor, serialize_tensor
from tests.conftest import CheckpointFactory
from tests.e2e.process import METRICS_KEY, Server, serving
from tests.machine import free_ports
from tests.waiting import DEADLINE, eventually

SECRET = "the-secret-of-these-tests"
STORY = "Once upon a time, in a valley between two mountains, there lived a clockmaker who never slept. " * 8


class Cluster:
    """Workers that register at a gateway, which is the coordinator, too."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._model = model
        self._secret = folder / "secret"
        self._secret.write_text(SECRET)
        self._secret.chmod(0o600)
        self.client = httpx.Client(timeout=DEADLINE)
        self.processes: dict[str, Server] = {}

    @contextmanager
    def running(self, workers: int) -> Iterator[None]:
        port = free_ports(2)
        coordinator = port + 1
        with ExitStack() as stack:
            options = ("--coordinator-port", str(coordinator))
            self.start(stack, "gateway", *options, command="gateway", port=port)
            self.gateway, self.coordinator = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{coordinator}"
            for number in range(workers):
                name = f"worker-{number}"
                own = ("--worker-id", name, "--gateway", self.gateway, "--no-warmup", "--cache-ram", "24MiB")
                self.start(stack, name, str(self._model), *own)
            eventually(lambda: self.client.get(f"{self.gateway}/ready").status_code == 200)
            eventually(lambda: self.statuses() == ["up"] * workers)
            yield

    def start(self, stack: ExitStack, name: str, *arguments: str, **settings: Any) -> None:
        folder = self._folder / name
        folder.mkdir()
        common = ("--kv-routes", "--cluster-secret-file", str(self._secret))
        self.processes[name] = stack.enter_context(serving(folder, *arguments, *common, **settings))

    def workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.coordinator}/workers").json()
        return found

    def statuses(self) -> list[str]:
        """Of all workers, as the gateway follows them."""
        listed = self.client.get(f"{self.gateway}/v1/cluster").json()["workers"]
        return [each["status"] for each in listed]

    def generate(self, prompt: str, **fields: Any) -> tuple[list[dict[str, Any]], httpx.Headers]:
        """The events of a generation that succeeds, and its headers."""
        body = {"prompt": prompt, "max_tokens": 5, **fields}
        answer = self.client.post(f"{self.gateway}/generate", json=body)
        assert answer.status_code == 200, answer.text
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        assert [events[0]["type"], events[-1]["type"]] == ["start", "done"]
        return events, answer.headers


@pytest.fixture(scope="module")
def cluster(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("sequences"), checkpoint("llama"))
    with cluster.running(workers=2):
        yield cluster


def test_the_cluster_is_up(cluster: Cluster) -> None:
    assert set(cluster.workers()) == {"worker-0", "worker-1"}
    health = {"status": "ok", "service": "coordinator"}
    assert cluster.client.get(f"{cluster.coordinator}/health").json() == health
    assert cluster.client.get(f"{cluster.gateway}/health").json() == {"status": "ok", "service": "gateway"}


def test_a_generation_streams_its_tokens(cluster: Cluster) -> None:
    (start, *tokens, done), _ = cluster.generate("Once upon a time", max_tokens=10, temperature=0.7)
    assert (start["prompt"], len(start["seq_id"])) == ("Once upon a time", 36)
    assert {frozenset(each) for each in tokens} == {frozenset({"type", "token", "token_id"})}
    assert done["generated_text"] == start["prompt"] + "".join(each["token"] for each in tokens)
    assert 1 <= done["tokens_generated"] == len(tokens) <= 10


def test_a_second_generation_finds_the_first_ones_prompt_cached_at_the_same_worker(cluster: Cluster) -> None:
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


def test_a_generation_is_answered_by_the_worker_that_its_sequence_is_routed_to(cluster: Cluster) -> None:
    def worker_of(sequence: str) -> str:
        routed: dict[str, str] = cluster.client.get(f"{cluster.coordinator}/kv/route/{sequence}").json()
        return routed["worker_id"]

    by_worker = {worker_of(name): name for name in (f"sequence {number}" for number in range(60))}
    assert by_worker.keys() == {"worker-0", "worker-1"}
    for named in ({"seq_id": by_worker["worker-0"]}, {"seq_id": by_worker["worker-1"]}, {}):
        (start, *_), headers = cluster.generate(STORY, **named)
        answer = dict(each.split("=") for each in headers["x-emberkv-route"].split(";"))
        assert (answer["worker"], answer["why"]) == (worker_of(start["seq_id"]), "sequence")


def test_many_generations_at_once_all_succeed(cluster: Cluster) -> None:
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


def test_statistics_add_up_what_was_generated_and_stored(cluster: Cluster) -> None:
    headers = {"authorization": f"Bearer {METRICS_KEY}"}

    def stats() -> dict[str, Any]:
        found: dict[str, Any] = cluster.client.get(f"{cluster.gateway}/stats", headers=headers).json()
        return found

    eventually(lambda: stats()["cluster_healthy"])
    before = stats()
    for number in range(3):
        cluster.generate(f"Sequence {number}")
    cluster.client.post(f"{cluster.gateway}/kv/put", json={"seq_id": "counted", "layer": 0, **layer()})
    after = stats()
    for found in (before, after):
        assert found["cluster_healthy"], found["workers"]
        assert all(each["prefix_cache"]["used_bytes"] <= each["prefix_cache"]["max_bytes"] for each in found["workers"])
    assert after["total_sequences"] - before["total_sequences"] == 4
    assert after["total_kv_entries"] - before["total_kv_entries"] == 1


def layer() -> dict[str, Any]:
    return {name: serialize_tensor(torch.randn(5, 12, 64)) for name in ("k", "v")}


def test_tensors_land_on_the_worker_that_the_coordinator_names(cluster: Cluster) -> None:
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


def test_keys_and_values_of_a_generation_are_under_its_sequence(cluster: Cluster) -> None:
    events, headers = cluster.generate(STORY, seq_id="kept", max_tokens=4, temperature=0)
    cached = dict(each.split("=") for each in headers["x-emberkv-cache"].split(";"))
    rows = int(cached.get("hit", 0)) + int(cached["miss"]) + events[-1]["tokens_generated"] - 1
    worker = cluster.client.get(f"{cluster.coordinator}/kv/route/kept").json()["address"]
    shape = cluster.client.get(f"{worker}/inference/model/info").json()["model_info"]

    def get(name: str, at: int) -> httpx.Response:
        return cluster.client.post(f"{cluster.gateway}/kv/get", json={"seq_id": name, "layer": at})

    for at in range(shape["num_layers"]):
        found = get("kept", at).json()
        assert found["seq_len"] == rows
        keys, values = (deserialize_tensor(found[name], library="torch") for name in ("k", "v"))
        assert keys.shape == values.shape == (rows, shape["num_kv_heads"], shape["head_dim"])
        assert cluster.client.get(f"{worker}/kv/kept/{at}/length").json()["seq_len"] == rows
    assert get("kept", shape["num_layers"]).status_code == 404
    one = {name: serialize_tensor(torch.zeros(1, *keys.shape[1:], dtype=keys.dtype)) for name in ("k", "v")}
    added = cluster.client.post(f"{cluster.gateway}/kv/append", json={"seq_id": "kept", "layer": 0, **one}).json()
    assert added["seq_len"] == get("kept", 0).json()["seq_len"] == rows + 1
    cluster.client.delete(f"{worker}/kv/kept")
    assert [get("kept", at).status_code for at in range(2)] == [404, 404]


def test_a_worker_that_stops_leaves_the_ring(cluster: Cluster) -> None:
    """It is the last test of the module, as it stops one of the workers."""
    cluster.processes["worker-1"].process.terminate()
    eventually(lambda: set(cluster.workers()) == {"worker-0"})
    for number in range(5):
        route = cluster.client.get(f"{cluster.coordinator}/kv/route/{number}").json()
        assert route["worker_id"] == "worker-0"
        cluster.generate(f"After it has stopped {number}")
