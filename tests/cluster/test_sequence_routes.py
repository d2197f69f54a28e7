"""A coordinator's and a gateway's routes by sequence, over workers in this process."""

import asyncio
import gzip
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest
import torch
import uvicorn
from fastapi import Request

from emberkv.cluster.hash_ring import VIRTUAL_NODES
from emberkv.cluster.sequence_routes import (
    ByPort,
    Member,
    RegisteredMembers,
    SequenceGateway,
    SequenceRing,
    coordinator_app,
)
from emberkv.serving.app import create_app
from emberkv.serving.errors import UnauthorizedError
from emberkv.serving.generate_api import worker_routers
from emberkv.serving.kv_tensors import KVTensorStore
from emberkv.serving.lifecycle import Lifecycle, ServedModel
from emberkv.serving.server import bind_socket
from emberkv.tensors import deserialize_tensor, serialize_tensor
from tests.serving.fakes import ByteTokenizer, FakeEngine
from tests.serving.harness import MODEL, Client
from tests.waiting import DEADLINE

IDS = [f"test-seq-{number}" for number in range(5000)]


async def open_to_all(_http: Request) -> None: ...


async def closed(_http: Request) -> None:
    raise UnauthorizedError("this needs the cluster's secret")


def members(count: int) -> RegisteredMembers:
    found = RegisteredMembers()
    for number in range(count):
        found.register(f"worker-{number}", f"http://127.0.0.1:{9000 + number}")
    return found


def coordinator(found: RegisteredMembers) -> Client:
    return Client(coordinator_app(found, open_to_all))


def test_workers_come_move_and_go() -> None:
    client = coordinator(RegisteredMembers())
    assert client.get("/health").json() == {"status": "ok", "service": "coordinator"}
    assert client.get("/workers").json() == {}
    assert client.get("/kv/route/s").json() == {"error": "No workers available"}
    for address in ("http://127.0.0.1:1", "http://127.0.0.1:2"):
        answer = client.post("/register", {"worker_id": "w", "address": address})
        assert answer.json() == {"message": "Worker w registered."}
        assert client.get("/workers").json() == {"w": {"address": address}}
        assert client.get("/kv/route/s").json() == {"worker_id": "w", "address": address, "seq_id": "s"}
        assert client.get("/stats").json() == {
            "total_workers": 1,
            "workers": {"w": {"address": address}},
            "hash_ring": {"virtual_nodes": VIRTUAL_NODES, "total_nodes": VIRTUAL_NODES},
        }
    gone = {"worker_id": "w", "address": ""}
    assert client.post("/deregister", gone).json() == {"message": "Worker w deregistered."}
    assert client.post("/deregister", gone).json() == {"error": "worker not found"}
    assert client.get("/workers").json() == {}


@pytest.mark.parametrize("body", [{}, {"worker_id": "w"}, {"worker_id": "w", "address": "not a URL"}, None])
def test_a_registration_of_another_shape_is_422(body: Any) -> None:
    answer = coordinator(RegisteredMembers()).post("/register", body)
    assert answer.status_code == 422
    assert {"type", "loc", "msg", "input"} == set(answer.json()["detail"][0])


@pytest.mark.parametrize("path", ["/kv/route/", "/kv/route/a/b", "/nothing"])
def test_unknown_paths_are_404(path: str) -> None:
    answer = coordinator(members(1)).get(path)
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


def test_a_registration_without_the_secret_is_refused() -> None:
    found = RegisteredMembers()
    client = Client(coordinator_app(found, closed))
    answer = client.post("/register", {"worker_id": "w", "address": "http://127.0.0.1:1"})
    assert (answer.status_code, answer.json()) == (401, {"detail": "this needs the cluster's secret"})
    assert found.members() == ()


def owners(ring: SequenceRing) -> list[str]:
    return [owner.worker_id for each in IDS if (owner := ring.owner(each)) is not None]


def test_a_sequence_always_belongs_to_the_same_worker() -> None:
    client = coordinator(members(4))
    assert len({client.get("/kv/route/test-seq-123").json()["worker_id"] for _ in range(10)}) == 1
    assert owners(SequenceRing(members(4))) == owners(SequenceRing(members(4)))


@pytest.mark.parametrize(("workers", "bound"), [(2, 1.15), (3, 1.15), (4, 1.15), (5, 1.15), (8, 1.15), (16, 1.25)])
def test_sequences_are_spread_evenly(workers: int, bound: float) -> None:
    counts = Counter(owners(SequenceRing(members(workers))))
    assert len(counts) == workers
    assert max(counts.values()) <= bound * len(IDS) / workers


def test_a_fifth_worker_takes_a_fifth_of_the_sequences_and_moves_no_other() -> None:
    found = members(4)
    ring = SequenceRing(found)
    before = owners(ring)
    found.register("worker-4", "http://127.0.0.1:9004")
    moved = [after for was, after in zip(before, owners(ring), strict=True) if was != after]
    assert set(moved) == {"worker-4"}
    assert 0.18 <= len(moved) / len(IDS) <= 0.22


def test_the_sequences_of_a_worker_that_is_down_belong_to_others_until_it_is_back() -> None:
    found = members(3)
    ring = SequenceRing(found)
    before = owners(ring)
    found.set_up("worker-1", False)
    during = owners(ring)
    assert [was == now for was, now in zip(before, during, strict=True)] == [was != "worker-1" for was in before]
    found.set_up("worker-1", True)
    assert owners(ring) == before


def test_while_no_worker_is_up_sequences_keep_an_owner() -> None:
    found = members(1)
    found.set_up("worker-0", False)
    assert SequenceRing(found).owner("s") == Member("worker-0", "http://127.0.0.1:9000", is_up=False)


class Cluster:
    """Workers that listen, and a gateway over them, whose own engine is a fake one."""

    def __init__(self) -> None:
        self.members = RegisteredMembers()
        self.stores: dict[str, KVTensorStore] = {}
        self.engine = FakeEngine()

    @asynccontextmanager
    async def running(self, count: int) -> AsyncGenerator[httpx.AsyncClient]:
        async with AsyncExitStack() as stack:
            for number in range(count):
                name = f"worker-{number}"
                self.stores[name] = KVTensorStore(max_bytes=2**28, max_entries=50_000)
                app = create_app(Lifecycle(), routers=worker_routers(self.stores[name], name))
                self.members.register(name, await stack.enter_async_context(listening(app)))
            lifecycle = Lifecycle()
            lifecycle.loaded(ServedModel((MODEL,), 0, self.engine, ByteTokenizer()))
            client = await stack.enter_async_context(aiohttp.ClientSession())
            gateway = SequenceGateway(self.members, open_to_all, client)
            transport = httpx.ASGITransport(create_app(lifecycle, routers=[gateway.routes]))
            yield await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://test", timeout=DEADLINE)
            )


@asynccontextmanager
async def listening(app: Any) -> AsyncGenerator[str]:
    bound = bind_socket(port=0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[bound])
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        await server.shutdown(sockets=[bound])


def run(scenario: Callable[[Cluster, httpx.AsyncClient], Awaitable[None]], workers: int = 3) -> None:
    async def running() -> None:
        cluster = Cluster()
        async with cluster.running(workers) as gateway:
            await scenario(cluster, gateway)
        cluster.engine.stop()

    asyncio.run(running())


def layer(rows: int) -> dict[str, Any]:
    return {name: serialize_tensor(torch.randn(rows, 12, 64)) for name in ("k", "v")}


def test_tensors_are_on_the_worker_of_their_sequence_and_nowhere_else() -> None:
    async def scenario(cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        for number in range(12):
            name, given = f"s{number}", layer(5)
            owner = (await gateway.get(f"/kv/route/{name}")).json()
            put = (await gateway.post("/kv/put", json={"seq_id": name, "layer": 0, **given})).json()
            assert put["worker_id"] == owner["worker_id"]
            held = {worker for worker, store in cluster.stores.items() if store.length(("", name), 0)}
            assert held == {owner["worker_id"]}
            for expected in (6, 7, 8):
                added = (await gateway.post("/kv/append", json={"seq_id": name, "layer": 0, **layer(1)})).json()
                assert (added["seq_len"], added["worker_id"]) == (expected, owner["worker_id"])
            found = (await gateway.post("/kv/get", json={"seq_id": name, "layer": 0})).json()
            assert found["worker_id"] == owner["worker_id"]
            kept = deserialize_tensor(found["k"], library="torch")
            assert torch.equal(kept[:5], deserialize_tensor(given["k"], library="torch"))
            assert kept.shape == (8, 12, 64)

    run(scenario)


def test_a_compressed_body_is_forwarded() -> None:
    async def scenario(_cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        body = gzip.compress(json.dumps({"seq_id": "s", "layer": 0, **layer(2)}).encode())
        put = await gateway.post("/kv/put", content=body, headers={"content-encoding": "gzip"})
        assert (put.status_code, put.json()["seq_len"]) == (200, 2)

    run(scenario, workers=1)


def test_the_workers_refusals_come_through() -> None:
    async def scenario(_cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        missing = await gateway.post("/kv/get", json={"seq_id": "s", "layer": 0})
        assert (missing.status_code, missing.json()) == (404, {"detail": "KV entry not found"})
        for fields, field in (({"layer": 0}, "seq_id"), ({"seq_id": "s", "layer": 0, "k": [1], "v": {}}, "k")):
            wrong = await gateway.post("/kv/put", json=fields)
            assert wrong.status_code == 422
            assert wrong.json()["detail"][0]["loc"] == ["body", field]
        undecodable = await gateway.post("/kv/put", json={"seq_id": "s", "layer": 0, "k": {}, "v": {}})
        assert undecodable.status_code == 400
        assert (await gateway.delete("/kv/s")).status_code in (404, 405)

    run(scenario, workers=1)


def test_sums_are_true_also_where_a_worker_is_gone() -> None:
    async def scenario(cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        bodies = [{"seq_id": f"s{number}", "layer": at, **layer(2)} for number in range(10) for at in range(3)]
        for body in bodies:
            assert (await gateway.post("/kv/put", json=body)).status_code == 200
        for number in range(3):
            await gateway.post("/generate", json={"prompt": f"Prompt {number}", "max_tokens": 2})
        found = (await gateway.get("/stats")).json()
        sums = {"total_sequences": 13, "total_kv_entries": 30}
        assert found["aggregate"] == sums
        assert {name: found[name] for name in sums} == sums
        assert (found["total_entries"], found["total_bytes"]) == (30, 30 * 2 * 2 * 12 * 64 * 4)
        assert (found["total_workers"], found["healthy_workers"], found["cluster_healthy"]) == (2, 2, True)
        assert {each["worker_id"]: each["kv_cache"]["entries"] for each in found["workers"]} == {
            name: store.stats().entries for name, store in cluster.stores.items()
        }
        cluster.members.register("worker-9", "http://127.0.0.1:9")
        found = (await gateway.get("/stats")).json()
        assert (found["total_workers"], found["healthy_workers"], found["cluster_healthy"]) == (3, 2, False)
        assert found["aggregate"] == sums
        (gone,) = [each for each in found["workers"] if each["worker_id"] == "worker-9"]
        assert gone["address"] == "http://127.0.0.1:9"
        assert gone["health"] == {"status": "unreachable"}

    run(scenario, workers=2)


def test_a_worker_without_these_routes_is_shown_with_its_status() -> None:
    async def scenario(cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        async with listening(create_app(Lifecycle())) as plain:
            cluster.members.register("plain", plain)
            (found,) = (await gateway.get("/stats")).json()["workers"]
            assert found == {"worker_id": "plain", "address": plain, "status": "error", "error": "HTTP 404"}

    run(scenario, workers=0)


def test_without_workers_stats_are_empty_and_tensors_are_refused() -> None:
    async def scenario(_cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        assert (await gateway.get("/health")).json() == {"status": "ok", "service": "gateway"}
        found = (await gateway.get("/stats")).json()
        assert (found["workers"], found["total_workers"], found["cluster_healthy"]) == ([], 0, False)
        refused = await gateway.post("/kv/get", json={"seq_id": "s", "layer": 0})
        assert (refused.status_code, refused.json()) == (503, {"detail": "Failed to route seq_id s"})
        assert refused.headers["retry-after"] == "1"

    run(scenario, workers=0)


def test_a_worker_that_does_not_answer_is_named() -> None:
    async def scenario(cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        cluster.members.register("gone", "http://127.0.0.1:9")
        refused = await gateway.post("/kv/get", json={"seq_id": "s", "layer": 0})
        assert refused.status_code == 503
        assert "worker gone, which has seq_id s, does not answer" in refused.json()["detail"]

    run(scenario, workers=0)


def test_a_gateway_draws_the_ids_of_sequences() -> None:
    async def scenario(cluster: Cluster, gateway: httpx.AsyncClient) -> None:
        for _ in range(2):
            answer = await gateway.post("/generate", json={"prompt": "Once", "max_tokens": 1})
            assert answer.status_code == 200
        ids = [request.session_id for request in cluster.engine.submitted]
        assert [len(each) for each in ids] == [36, 36]
        assert len(set(ids)) == 2

    run(scenario, workers=0)


def test_a_coordinator_has_a_port_of_its_own() -> None:
    async def scenario() -> None:
        found = members(1)
        bound = bind_socket(port=0)
        port = bound.getsockname()[1]
        both = ByPort(create_app(Lifecycle()), port, coordinator_app(found, open_to_all))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(both), base_url=f"http://127.0.0.1:{port}") as asked:
            assert (await asked.get("/workers")).json() == {"worker-0": {"address": "http://127.0.0.1:9000"}}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(both), base_url="http://127.0.0.1:1") as asked:
            assert (await asked.get("/health")).json() == {"status": "alive"}
        bound.close()

    asyncio.run(scenario())
