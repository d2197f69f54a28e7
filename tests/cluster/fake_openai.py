"""A server that speaks the OpenAI API, whose answers are fixed, and which fails where a test sets it to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKENS = ["One", " two", " three"]


@dataclass
class FakeOpenAI:
    """cached: tokens of the next prompts that it says were cached; None: it does not say. status: of its answers.
    dies_after: events of a stream after which it drops the connection; 0 drops every request. sends_done: whether a
    stream ends with ``[DONE]``. deltas: of its streams, behind the role; None: one for each of `TOKENS`. message: of
    its whole answers, beside the role. body: of whole answers, in place of all that; a stream is ``[DONE]`` alone then.
    streams: whether it answers requests for a stream by one. reason: of the answer's end; None: it has none.
    fails_early: whether the first event of a stream is an error. drops_kept: how many requests on connections with a
    health check before them it drops. compresses: whether the client accepts it or not. held: what answers wait for.
    held_stream: what streams wait for behind the first token. requests: bodies as they came, with their headers.
    checks: how often it was asked for its health.
    """

    models: tuple[str, ...] = ("m",)
    prompt_tokens: int = 100
    cached: int | None = 0
    status: int = 200
    health: int = 200
    dies_after: int | None = None
    sends_done: bool = True
    is_loading: bool = False
    compresses: bool = False
    deltas: list[dict[str, Any]] | None = None
    message: dict[str, Any] | None = None
    body: object = None
    reason: str | None = "stop"
    streams: bool = True
    fails_early: bool = False
    drops_kept: int = 0
    held: asyncio.Event | None = None
    held_stream: asyncio.Event | None = None
    requests: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    checks: int = 0
    _known: set[asyncio.BaseTransport] = field(default_factory=set)

    def usage(self) -> dict[str, Any]:
        details = {} if self.cached is None else {"prompt_tokens_details": {"cached_tokens": self.cached}}
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": len(TOKENS), **details}

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeOpenAI"]:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            if self.held is not None:
                self.held.set()
            await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.checks += 1
        self._known.add(request.transport)
        return web.Response(status=self.health)

    async def _models(self, _request: web.Request) -> web.Response:
        if self.is_loading:
            return web.Response(status=503)
        return web.json_response({"object": "list", "data": [{"id": name, "owned_by": "fake"} for name in self.models]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        if self.drops_kept and request.transport in self._known:
            self.drops_kept -= 1
            request.transport.abort()
        self.requests.append((raw, {name.lower(): value for name, value in request.headers.items()}))
        body = json.loads(raw)
        if self.held is not None:
            await self.held.wait()
        if self.dies_after == 0:
            assert request.transport is not None
            request.transport.abort()
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status, headers={"retry-after": "7"})
        if body.get("stream") and self.streams:
            return await self._stream(request, body)
        if self.body is not None:
            return web.json_response(self.body)
        message = {"role": "assistant", "content": "".join(TOKENS), "tool_calls": [{"id": "c", "odd": [1, None]}]}
        message = message if self.message is None else {"role": "assistant", **self.message}
        choice = {"index": 0, "message": message, "finish_reason": self.reason}
        answer = {"id": "cmpl-fake", "object": "chat.completion", "choices": [choice], "usage": self.usage()}
        response = web.json_response(answer, headers={"x-of-the-worker": "yes"})
        if self.compresses:
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        asks_usage = (body.get("stream_options") or {}).get("include_usage")
        nothing = {"usage": None} if asks_usage else {}
        if self.fails_early:
            await self._send(response, {"error": {"message": "out of memory", "code": 500}})
            return response
        parts = [{"content": each} for each in TOKENS] if self.deltas is None else self.deltas
        if self.body is not None:
            await response.write(b"data: [DONE]\n\n")
            return response
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *parts]
        for number, delta in enumerate(deltas):
            if number == self.dies_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            ended = self.reason if number == len(deltas) - 1 else None
            await self._send(response, {"choices": [{"index": 0, "delta": delta, "finish_reason": ended}], **nothing})
            if number == 1 and self.held_stream is not None:
                await self.held_stream.wait()
        if asks_usage:
            await self._send(response, {"choices": [], "usage": self.usage()})
        if self.sends_done:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps({'id': 'cmpl-fake', **chunk})}\n\n".encode())
