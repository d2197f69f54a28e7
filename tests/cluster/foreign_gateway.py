"""What tests of a gateway over foreign workers share: fake servers behind a gateway, and a client of it."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from emberkv.cluster.foreign.client import ForeignClient
from emberkv.cluster.foreign.fleet import ForeignFleet
from emberkv.cluster.foreign.prompts import PromptReader
from emberkv.cluster.foreign.worker import ForeignSpec
from emberkv.cluster.gateway import Gateway
from emberkv.cluster.worker_client import Deadlines
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.trace_recorder import TraceRecorder
from tests.cluster.fake_openai import FakeOpenAI
from tests.cluster.fake_workers import FakeConnection, FakeWorker
from tests.waiting import DEADLINE, until

TEXT = "The lamps along the street are lit at six and go out at dawn. " * 20
CHAT = "/v1/chat/completions"


def chat(question: str = "Which are lit?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
    return {"model": "m", "messages": messages, **more}


class Served:
    """A gateway over fake servers, and a client of it."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, servers: list[FakeOpenAI]) -> None:
        self.gateway = gateway
        self.client = client
        self.servers = servers

    @property
    def fleet(self) -> ForeignFleet:
        assert self.gateway.fleet is not None
        return self.gateway.fleet

    async def ask(self, body: dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    def asked(self) -> list[int]:
        """How many requests each server has got."""
        return [len(server.requests) for server in self.servers]


@asynccontextmanager
async def served(
    *servers: FakeOpenAI, settings: str = "", own: FakeWorker | None = None, app: ServingSettings | None = None,
    recorder: TraceRecorder | None = None, reader: PromptReader | None = None,
    on_send: Callable[[Message], None] = lambda _: None, **limits: int,
) -> AsyncIterator[Served]:  # fmt: skip
    """settings: of each worker, as behind its URL. own: an emberkv worker beside them. on_send: called before each
    message to a client.
    """
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.running())
        specs = [
            ForeignSpec.parse(f"{server.url},id={name}{settings}") for name, server in zip("abc", servers, strict=False)
        ]
        gateway = Gateway(
            Lifecycle(), lambda _: FakeConnection(own or FakeWorker("none")), secret=None, rng=random.Random(0),
            workers=[] if own is None else ["own"], **limits,
        )  # fmt: skip
        deadlines = Deadlines(connect=DEADLINE, answer=DEADLINE, silence=DEADLINE)
        gateway.add_foreign(
            specs,
            lambda spec: ForeignClient(spec.url, deadlines=deadlines),
            reader or PromptReader(block_size=16),
            recorder,
        )
        assert gateway.fleet is not None
        gateway.fleet.seconds = 0.01
        app = app or ServingSettings(bound_to_loopback=True)
        built = create_app(gateway.lifecycle, app, routers=[gateway.routes])

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                on_send(message)
                await send(message)

            await built(scope, receive, sent)

        transport = httpx.ASGITransport(watched, raise_app_exceptions=False)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=DEADLINE)
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        it = Served(gateway, client, list(servers))
        await until(lambda: len(it.fleet.up) == sum(server.health == 200 for server in servers))
        yield it
