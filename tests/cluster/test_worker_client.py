"""How a gateway asks a worker: over which connections."""

import asyncio

from aiohttp import web

from emberkv.cluster import wire
from emberkv.cluster.worker_client import WorkerClient
from emberkv.core.sequence import FinishReason
from emberkv.engine.request import GenerationRequest, SamplingParams, TokenOutput


def test_answers_that_were_read_to_their_end_share_a_connection() -> None:
    connections, is_read = set(), asyncio.Event()

    async def generate(http: web.Request) -> web.StreamResponse:
        connections.add(http.transport)
        response = web.StreamResponse()
        await response.prepare(http)
        last = TokenOutput("x", (7,), finish_reason=FinishReason.LENGTH)
        await response.write(wire.frame(wire.encode_output(last)))
        await is_read.wait()
        is_read.clear()
        return response

    async def run() -> None:
        app = web.Application()
        app.router.add_post(f"{wire.PREFIX}/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with WorkerClient(f"http://127.0.0.1:{runner.addresses[0][1]}", "secret") as client:
            for _ in range(3):
                request = GenerationRequest("x", [1, 2], SamplingParams(max_tokens=1))
                async for output in client.generate(request):
                    assert output.token_ids == (7,)
                    is_read.set()
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(connections) == 1
