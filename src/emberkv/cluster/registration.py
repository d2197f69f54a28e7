"""A worker registers at its gateways, again and again, and deregisters before it drains."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Any

import httpx
from starlette.types import ASGIApp

from emberkv.cluster import wire
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import HttpServer

_log = logging.getLogger(__name__)

REGISTER_SECONDS = 2.0
"""Between two registrations at a gateway, which may have been restarted meanwhile."""

ANSWER_SECONDS = 2.0
"""How long one of them waits for the gateway."""


class Registrar:
    """Registers a worker at gateways. Belongs to the event loop.

    gateways: their URLs. secret: the cluster's. transport: to gateways; None: HTTP.
    """

    def __init__(
        self,
        worker: wire.Registration,
        gateways: Sequence[str],
        secret: str,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        seconds: float = REGISTER_SECONDS,
    ) -> None:
        self._body = wire.encode(worker)
        self._gateways = gateways
        self._seconds = seconds
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {secret}", "content-type": wire.MEDIA_TYPE},
            timeout=ANSWER_SECONDS,
            transport=transport,
            trust_env=False,
        )
        self._problems: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to register, at each gateway by itself: one that hangs delays no other."""
        self._tasks = [asyncio.create_task(self._register(gateway)) for gateway in self._gateways]

    async def stop(self) -> None:
        """Take leave of all gateways; one that does not answer is not waited for beyond `ANSWER_SECONDS`."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(self._send(gateway, "deregister") for gateway in self._gateways))
        await self._http.aclose()

    async def _register(self, gateway: str) -> None:
        while True:
            await self._send(gateway, "register")
            await asyncio.sleep(self._seconds)

    async def _send(self, gateway: str, route: str) -> None:
        """A failure is logged once, until something else happens."""
        try:
            response = await self._http.post(f"{gateway}{wire.PREFIX}/{route}", content=self._body)
        except httpx.HTTPError as error:
            problem = f"cannot be reached: {str(error) or type(error).__name__}"
        else:
            problem = "" if response.is_success else _refusal(response)
        if problem and problem != self._problems.get(gateway):
            _log.warning("gateway %s %s; the worker goes on asking", gateway, problem)
        elif not problem and self._problems.get(gateway, "never") and route == "register":
            _log.info("registered at gateway %s", gateway)
        self._problems[gateway] = problem


def _refusal(response: httpx.Response) -> str:
    if response.status_code == 401:
        return "refuses the cluster's secret (give all parts the same one)"
    try:
        reason = f": {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):  # not a gateway's own answer
        reason = ""
    return f"refuses the registration with status {response.status_code}{reason}"


class WorkerServer(HttpServer):
    """A server that registers at gateways while it takes requests."""

    def __init__(
        self, app: ASGIApp, lifecycle: Lifecycle, bound: socket.socket, registrar: Registrar, **settings: Any
    ) -> None:
        super().__init__(app, lifecycle, bound, **settings)
        self._registrar = registrar

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._registrar.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._registrar.stop()
        finally:
            await super().shutdown(sockets)
