"""The internal routes of a worker, for gateways that know the cluster's secret. docs/cluster.md lists them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from hashlib import sha256
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emberkv import __version__, event_wire
from emberkv.cluster import wire, wire_commands
from emberkv.cluster.cache_operations import decode_operation
from emberkv.cluster.worker_channel import MAX_REQUESTS, ChannelResponse, RequestChannels, failure_message
from emberkv.core.feed import BATCH_EVENTS, CHUNK_BLOCKS, EventBatch
from emberkv.engine.assembly import AssembledEngine
from emberkv.engine.commands import Command, ReadEvents, ReadLoad, ReadSnapshot, Remove, RemovedBlocks
from emberkv.errors import ConfigError, EmberError, EngineStoppedError, RemoteTierError, RequestError, WireError
from emberkv.serving.app import AppParts, RouterFactory
from emberkv.serving.auth import check_cluster_secret
from emberkv.serving.cache.service import ANSWER_SECONDS, NO_ANSWER, explanation_json
from emberkv.serving.errors import NotFoundError, NotReadyError, failure_of
from emberkv.serving.event_stream import unless_disconnected
from emberkv.serving.lifecycle import Lifecycle, ServedModel, ServerPhase
from emberkv.serving.middleware import ENDLESS_BODY
from emberkv.serving.tenancy import Tenant
from emberkv.tiers.base import RemovalResult

R = TypeVar("R")

_log = logging.getLogger(__name__)

WAKE_SECONDS = 0.1
"""How long `wake` is answered after; loading, which goes on, has begun by then."""

LEAST_REPORT_SECONDS = 0.05
"""Between two reports on one stream of events."""

Answer = Callable[[Request], Awaitable[Response]]


def worker_routes(worker_id: str, secret: str, *, max_requests: int = MAX_REQUESTS) -> RouterFactory:
    """What a server answers as a worker, beside its own routes; for `create_app`. secret: the cluster's. max_requests:
    of gateways, at once.
    """

    def router(parts: AppParts) -> APIRouter:
        channels = RequestChannels(parts.lifecycle, parts.answers.engine, max_requests)
        parts.register(channels)
        return WorkerRoutes(parts.lifecycle, worker_id, secret, channels).router()

    return router


class WorkerRoutes:
    """Answers about the model that ``lifecycle`` holds. It belongs to the event loop."""

    def __init__(self, lifecycle: Lifecycle, worker_id: str, secret: str, channels: RequestChannels) -> None:
        self._lifecycle = lifecycle
        self._worker_id = worker_id
        self._channels = channels
        self._secret = secret
        self._loading: set[asyncio.Task[None]] = set()
        self._watched: AssembledEngine | None = None
        self._wakes: set[asyncio.Event] = set()
        self._wake_is_due = False
        self._tokenizer: tuple[ServedModel, wire.TokenizerFiles] | None = None

    def router(self) -> APIRouter:
        router = APIRouter(prefix=wire.PREFIX)
        for answer in (self.worker, self.tokenizer, self.events, self.snapshot, self.stored, self.load):
            self._add(router, "GET", answer)
        for answer in (self.channel, self.command, self.explain, self.operate, self.wake):
            self._add(router, "POST", answer)
        return router

    def _add(self, router: APIRouter, method: str, answer: Answer) -> None:
        async def endpoint(http: Request) -> Response:
            try:
                self._check(http)
                return await answer(http)
            except EmberError as error:
                return refused(error)

        name = getattr(answer, "__name__", "")
        router.add_api_route(f"/{name}", endpoint, methods=[method], include_in_schema=False, name=f"internal {name}")

    def _check(self, http: Request) -> None:
        """Raises UnauthorizedError without the cluster's secret, WireError for another version of the wire form."""
        check_cluster_secret(http.headers, self._secret)
        accepted = http.headers.get("accept", "*/*")
        if accepted not in (wire.MEDIA_TYPE, "*/*"):
            raise WireError(f"{accepted[:100]!r} is asked for; this worker answers in {wire.MEDIA_TYPE}")

    async def worker(self, _http: Request) -> Response:
        model, engine = self._served()
        files = await self._tokenizer_files(model)
        events = engine.scheduler.cache.pool.events
        description = wire.WorkerDescription(
            worker_id=self._worker_id,
            epoch=events.epoch,
            sequence=events.last_sequence,
            version=__version__,
            names=model.names,
            name_patterns=model.name_patterns.patterns,
            fingerprint=model.fingerprint,
            root=engine.root,
            namespace=engine.namespace,
            block_size=engine.block_size,
            context_length=model.engine.context_length,
            max_prompt_tokens=model.engine.max_prompt_tokens,
            hit_unit=engine.hit_unit,
            takes_borders=engine.scheduler.cache.takes_borders,
            exact=engine.scheduler.cache.exact,
            public_prefixes=tuple(wire.encode_prompt(tokens) for tokens in engine.public.prefixes),
            sampling_defaults=model.sampling_defaults,
            about=dict(model.about),
            created=model.created,
            tokenizer=files.etag,
            shared_tiers=_shared_tiers(engine),
        )
        return _message(description)

    async def tokenizer(self, http: Request) -> Response:
        files = await self._tokenizer_files(self._served()[0])
        etag = f'"{files.etag}"'
        if http.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        return _message(files, {"etag": etag})

    async def load(self, _http: Request) -> Response:
        return _message(await self._report(self._served()[1]))

    async def snapshot(self, http: Request) -> Response:
        engine = self._served()[1]
        limit = _number(http, "limit", CHUNK_BLOCKS, least=1, most=10 * CHUNK_BLOCKS)
        chunk = await _ask(engine, ReadSnapshot(http.query_params.get("cursor", "")[:64], limit))
        return Response(event_wire.encode(chunk, tokens=False), media_type=wire.MEDIA_TYPE)

    async def stored(self, http: Request) -> Response:
        tiers = self._served()[1].tiers
        cursor = _number(http, "cursor", 0, least=0, most=2**63 - 1)
        if tiers is None:
            return _message(wire.StoredBlocks((), None))
        try:
            found, following = await asyncio.to_thread(tiers.scan, http.query_params.get("tier", ""), cursor)
        except RemoteTierError as error:
            raise NotReadyError(f"{error}; ask again later") from error
        return _message(wire.StoredBlocks(tuple(found), following))

    async def events(self, http: Request) -> Response:
        engine = self._served()[1]
        after = _number(http, "after", 0, least=0, most=2**63 - 1)
        self._watch(engine)
        wake = asyncio.Event()
        self._wakes.add(wake)
        draining = asyncio.create_task(self._lifecycle.drained.wait())
        draining.add_done_callback(lambda _: wake.set())

        def end() -> None:
            self._wakes.discard(wake)
            draining.cancel()

        return FrameStream(self._news(engine, after, wake), end)

    async def channel(self, http: Request) -> Response:
        http.scope[ENDLESS_BODY] = True
        return ChannelResponse(self._channels)

    async def command(self, http: Request) -> Response:
        model, engine = self._served()
        command = await asyncio.to_thread(wire_commands.decode_command, await http.body(), engine.root)
        if isinstance(command, Remove) and command.tiers and model.cache is not None:
            removal = await model.cache.remove_blocks(command.block_hashes)
            answered = wire_commands.encode_answer(RemovedBlocks(removal.pool), removal.tiers)
            return Response(answered, media_type=wire.MEDIA_TYPE)
        answer = await _ask(engine, command)
        removed: dict[str, RemovalResult] = {}
        if isinstance(answer, RemovedBlocks):
            awaited = {name: asyncio.wrap_future(future) for name, future in answer.tiers.items()}
            if awaited:
                await asyncio.wait(awaited.values(), timeout=ANSWER_SECONDS)
            removed = {name: each.result() if each.done() else NO_ANSWER for name, each in awaited.items()}
        return Response(wire_commands.encode_answer(answer, removed), media_type=wire.MEDIA_TYPE)

    async def explain(self, http: Request) -> Response:
        asked = wire.decode(await http.body(), wire.TenantPrompt)
        model = self._served()[0]
        if model.cache is None:
            raise NotFoundError("this worker keeps no account of what it has cached")
        explained = await model.cache.explain(wire.decode_prompt(asked.prompt), Tenant(asked.tenant, asked.salt))
        return _message(explanation_json(explained, model.tokenizer, now=time.time()))

    async def wake(self, _http: Request) -> Response:
        """The model is being loaded, or has been."""
        loading = asyncio.create_task(self._lifecycle.ensure_model())
        self._loading.add(loading)
        loading.add_done_callback(self._loaded)
        await asyncio.wait([loading], timeout=WAKE_SECONDS)
        return Response(status_code=204)

    def _loaded(self, loading: "asyncio.Task[None]") -> None:
        self._loading.discard(loading)
        if not loading.cancelled() and (error := loading.exception()) is not None:
            _log.error("the model cannot be loaded: %s", error)

    async def operate(self, http: Request) -> Response:
        operation = decode_operation(await http.body())
        model = self._served()[0]
        if model.cache is None:
            raise NotFoundError("this worker keeps no account of what it has cached")
        return _message(await operation.carry_out(model.cache, model.tokenizer))

    def _served(self) -> tuple[ServedModel, AssembledEngine]:
        model = self._lifecycle.model()
        if model.assembled is None:
            raise NotReadyError("this process has no engine of its own; ask a worker")
        return model, model.assembled

    async def _tokenizer_files(self, model: ServedModel) -> wire.TokenizerFiles:
        if self._tokenizer is None or self._tokenizer[0] is not model:
            files = await asyncio.to_thread(model.tokenizer.files)
            digest = sha256(wire.encode([files, model.tokenizer.chat_problem])).hexdigest()
            found = wire.TokenizerFiles(etag=digest[:32], files=files, chat_problem=model.tokenizer.chat_problem)
            self._tokenizer = model, found
        return self._tokenizer[1]

    async def _report(self, engine: AssembledEngine) -> wire.LoadReport:
        load = await _ask(engine, ReadLoad())
        pool = engine.scheduler.cache.pool
        tiers = engine.tiers.stats() if engine.tiers is not None else {}
        return wire.LoadReport(
            worker_id=self._worker_id,
            epoch=pool.events.epoch,
            sequence=load.sequence,
            waiting=load.waiting,
            running=load.running,
            waiting_tokens=load.waiting_tokens,
            prefill_tokens=load.prefill_tokens,
            decoding=load.decoding,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            block_bytes=engine.executor.pool.block_bytes,
            hit_tokens=pool.stats.hit_tokens,
            prefill_rate=load.prefill_rate,
            step_seconds=load.step_seconds,
            load_rates={name: stats.load_rate for name, stats in tiers.items() if stats.load_rate is not None},
            shared_tiers=_shared_tiers(engine),
            draining=self._lifecycle.phase is ServerPhase.DRAINING,
        )

    async def _news(self, engine: AssembledEngine, after: int, wake: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """The cache's events and the load, as they change, until the server ends or the engine stops."""
        begins, sent = True, None
        with contextlib.suppress(EngineStoppedError):
            while not self._lifecycle.drained.is_set():
                wake.clear()
                message = await _ask(engine, ReadEvents(after))
                if begins or not isinstance(message, EventBatch) or message.events:
                    yield wire.frame(wire.encode_cache_message(message))
                begins, after = False, message.last
                if isinstance(message, EventBatch) and len(message.events) == BATCH_EVENTS:
                    continue
                report = await self._report(engine)
                if report != sent:
                    yield wire.frame(wire.encode(report))
                    sent = report
                await asyncio.sleep(LEAST_REPORT_SECONDS)
                try:
                    async with asyncio.timeout(wire.HEARTBEAT_SECONDS):
                        await wake.wait()
                except TimeoutError:
                    sent = None  # so that the report is sent again, as a heartbeat

    def _watch(self, engine: AssembledEngine) -> None:
        """Have the streams of events woken when the engine's statistics change."""
        if self._watched is engine:
            return
        self._watched = engine
        loop = asyncio.get_running_loop()

        def wake_all() -> None:
            self._wake_is_due = False
            for wake in self._wakes:
                wake.set()

        def changed() -> None:
            if self._wakes and not self._wake_is_due:
                self._wake_is_due = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: there is no stream left
                    loop.call_soon_threadsafe(wake_all)

        engine.loop.on_stats(changed)


class FrameStream(Response):
    """Sends frames as they are made. on_end: called at the end, however it comes."""

    media_type = wire.MEDIA_TYPE

    def __init__(self, frames: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        # not Response.__init__, which would give the stream the length of an empty body
        self._frames = frames
        self._on_end = on_end
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._frames) as frames:
            async for data in frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def refused(error: EmberError) -> Response:
    status = 400 if isinstance(error, WireError | ConfigError) else failure_of(error).status
    return Response(wire.encode(failure_message(error)), status, media_type=wire.MEDIA_TYPE)


def _message(message: object, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.encode(message), headers=headers, media_type=wire.MEDIA_TYPE)


def _shared_tiers(engine: AssembledEngine) -> dict[str, wire.SharedTier]:
    stores = engine.tiers.shared() if engine.tiers is not None else {}
    return {name: wire.SharedTier(store.store_id, store.is_listed, store.is_scanned) for name, store in stores.items()}


def _ask(engine: AssembledEngine, command: Command[R]) -> Awaitable[R]:
    return asyncio.wrap_future(engine.loop.execute(command))


def _number(http: Request, name: str, default: int, *, least: int, most: int) -> int:
    given = http.query_params.get(name, str(default))
    if not (given.isdecimal() and given.isascii() and len(given) <= 19 and least <= int(given) <= most):
        raise RequestError(f"{name} is {given[:40]!r}; it must be a number from {least} to {most}", param=name)
    return int(given)
