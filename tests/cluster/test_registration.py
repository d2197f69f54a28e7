"""A worker registers at its gateways for as long as it takes requests, and takes its leave before it drains."""

import asyncio
import logging

import httpx
import pytest

from emberkv.cluster import wire
from emberkv.cluster.registration import Registrar
from tests.waiting import until

WORKER = wire.Registration(worker_id="w1", url="http://127.0.0.1:8001")


class Gateways(httpx.AsyncBaseTransport):
    """Gateways by host. asked: what each was asked, in order. broken: those that cannot be reached."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {"one": [], "two": []}
        self.broken: set[str] = set()
        self.status = 204

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if host in self.broken:
            raise httpx.ConnectError("connection refused")
        assert request.headers["authorization"] == "Bearer secret"
        assert wire.decode(await request.aread(), wire.Registration) == WORKER
        self.asked[host].append(request.url.path.removeprefix(f"{wire.PREFIX}/"))
        return httpx.Response(self.status)


def registrar(gateways: Gateways) -> Registrar:
    urls = ["http://one:1", "http://two:2"]
    return Registrar(WORKER, urls, "secret", transport=gateways, seconds=0.001)


def test_a_worker_registers_again_and_again_and_leaves_in_the_end() -> None:
    async def run() -> None:
        gateways = Gateways()
        worker = registrar(gateways)
        worker.start()
        await until(lambda: all(len(asked) > 2 for asked in gateways.asked.values()))
        await worker.stop()
        for asked in gateways.asked.values():
            assert asked[:-1] == ["register"] * (len(asked) - 1)
            assert asked[-1] == "deregister"

    asyncio.run(run())


def test_a_gateway_that_comes_back_is_registered_at(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        gateways = Gateways()
        gateways.broken = {"one"}
        worker = registrar(gateways)
        worker.start()
        await until(lambda: len(gateways.asked["two"]) > 3)
        assert not gateways.asked["one"]
        gateways.broken = set()
        await until(lambda: bool(gateways.asked["one"]))
        await worker.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "gateway http://one:1 cannot be reached: connection refused; the worker goes on asking"
    ]


def test_a_wrong_secret_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        gateways = Gateways()
        gateways.status = 401
        worker = registrar(gateways)
        worker.start()
        await until(lambda: all(len(asked) > 3 for asked in gateways.asked.values()))
        await worker.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"gateway {url} refuses the cluster's secret (give all parts the same one); the worker goes on asking"
        for url in ("http://one:1", "http://two:2")
    ]
