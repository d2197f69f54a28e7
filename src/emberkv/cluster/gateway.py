"""The gateway: the server's own app over an engine whose workers are elsewhere."""

import asyncio
import logging
import random
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emberkv.cluster import wire
from emberkv.cluster.cache_operations import ExplainRequest
from emberkv.cluster.cache_routes import ClusterCacheRoutes, load_json
from emberkv.cluster.cluster_engine import MAX_REQUESTS, ClusterEngine, route_header
from emberkv.cluster.foreign.fleet import ForeignFleet
from emberkv.cluster.foreign.prompts import PromptReader
from emberkv.cluster.foreign.routes import ForeignRoutes
from emberkv.cluster.foreign.worker import ForeignSpec, ForeignWorker
from emberkv.cluster.loop_clock import LoopClock
from emberkv.cluster.membership import Membership
from emberkv.cluster.removals import ClusterRemovals, operate
from emberkv.cluster.routing import DEFAULT_ROUTING, Recorder, make_router
from emberkv.cluster.workers import RoutedWorker, Worker, WorkerConnection, WorkerStatus
from emberkv.engine.request import GenerationRequest
from emberkv.errors import EmberError, RequestError, WireError
from emberkv.serving.admission import ConcurrencyLimit
from emberkv.serving.answer_service import ROUTE_HEADER
from emberkv.serving.app import AppParts
from emberkv.serving.auth import check_cluster_secret
from emberkv.serving.cache.volatile_lines import first_difference
from emberkv.serving.dashboard import dashboard_router
from emberkv.serving.lifecycle import Lifecycle, NamePatterns, ServedModel, chosen_output_format
from emberkv.serving.parsing.formats import AUTO
from emberkv.serving.server import HttpServer
from emberkv.serving.template_study import rewrites_turns
from emberkv.serving.trace_recorder import TraceRecorder

if TYPE_CHECKING:
    from emberkv.cluster.foreign.client import ForeignClient
    from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer

_log = logging.getLogger(__name__)


class Gateway:
    """The parts of a gateway. Its coroutines, and all that they make, belong to the server's event loop.

    connect: makes the connection to a worker's URL. workers: URLs of those that are followed from the beginning.
    secret: what workers register with; None: none may. routing: a policy's name. max_requests, weights: bound what is
    in flight, forwarded requests included (`ConcurrencyLimit`). on_overflow: of the `ServedModel`. parsers: names of
    formats, as --tool-parser and --reasoning-parser give them. missed_removals: a file, see `ClusterRemovals`. clock:
    by which workers are silent; `start` has it follow the event loop. load_tokenizer: as `tokenizer_of`, in a thread.
    on_stop: what else is closed at the end.

        gateway = Gateway(Lifecycle(), lambda url: WorkerClient(url, secret), secret=secret, workers=urls)
        app = create_app(gateway.lifecycle, routers=[gateway.routes])
        GatewayServer(app, gateway, bind_socket()).run()
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        connect: Callable[[str], WorkerConnection],
        *,
        secret: str | None,
        workers: Sequence[str] = (),
        routing: str = DEFAULT_ROUTING,
        max_requests: int = MAX_REQUESTS,
        weights: Mapping[str, float] | None = None,
        on_overflow: Literal["clip", "refuse"] = "clip",
        parsers: tuple[str, str] = (AUTO, AUTO),
        rng: random.Random | None = None,
        record: Recorder | None = None,
        missed_removals: Path | None = None,
        clock: LoopClock | None = None,
        load_tokenizer: "Callable[[wire.TokenizerFiles], HFTokenizer] | None" = None,
    ) -> None:
        self.lifecycle = lifecycle
        self._load_tokenizer = load_tokenizer or tokenizer_of
        self._clock = clock or LoopClock()
        router = make_router(routing, rng or random.Random())
        router.record = record
        self.membership = Membership(
            router, connect, on_model=self._has_model, on_change=self._changed, clock=self._clock
        )
        lifecycle.wake = self.membership.wake_idle
        self.removals = ClusterRemovals(self.membership, path=missed_removals)
        self.engine: ClusterEngine | None = None
        self.metrics = GatewayCollector(self)
        self.on_stop: list[Callable[[], Awaitable[None]]] = []
        self.fleet: ForeignFleet | None = None
        self._reader: PromptReader | None = None
        self._recorder: TraceRecorder | None = None
        self._secret = secret
        self._workers = workers
        self.in_flight = ConcurrencyLimit(max_requests, weights)
        self._on_overflow = on_overflow
        self._parsers = parsers

    def add_foreign(
        self,
        specs: Sequence[ForeignSpec],
        client: "Callable[[ForeignSpec], ForeignClient]",
        reader: PromptReader,
        recorder: TraceRecorder | None = None,
    ) -> None:
        """Forward requests to these workers, too; before the app is made. recorder: of a trace.

        Raises ConfigError for two workers of one id.
        """
        self._reader, self._recorder = reader, recorder
        self.fleet = ForeignFleet(
            self.membership, specs, client, reader, own=lambda: self.membership.model, clock=self._clock
        )

    async def start(self) -> None:
        """Begin to follow the workers."""
        self.lifecycle.detail = "no worker has been reached yet"
        self._clock.start()
        for url in self._workers:
            self.membership.add(url)
        self.removals.start()
        if self.fleet is not None:
            self.fleet.start()

    async def stop(self) -> None:
        """End what runs and close all connections."""
        if self.engine is not None:
            await self.engine.stop()
        await self.removals.close()
        await self.membership.close()
        if self.fleet is not None:
            await self.fleet.stop()
        for close in self.on_stop:
            await close()
        self._clock.stop()

    def routes(self, parts: AppParts) -> APIRouter:
        """What a gateway answers beside the server's own routes; its metrics are the app's, too."""
        parts.register(self.metrics)
        router = APIRouter()
        if self.fleet is not None and self._reader is not None:
            foreign = ForeignRoutes(
                parts,
                self.membership,
                self.fleet,
                self._reader,
                lambda: self.engine,
                in_flight=self.in_flight,
                recorder=self._recorder,
                clock=self._clock,
            )
            router.include_router(foreign.router())
        router.include_router(ClusterCacheRoutes(parts, self.membership, lambda: self.engine, self.removals).router())
        router.include_router(
            dashboard_router(
                parts.lifecycle,
                parts.guard,
                parts.answers.traffic,
                parts.wall_clock,
                self._workers_json,
                parts.answers.volatile_lines,
            )
        )

        @router.get("/v1/cluster", dependencies=[Depends(parts.guard.operator)])
        async def cluster() -> Response:
            return JSONResponse({"object": "cluster", "workers": self._workers_json()})

        @router.post(f"{wire.PREFIX}/register")
        async def register(http: Request) -> Response:
            registration = await self._registration(http)
            self.membership.register(registration.worker_id, registration.url)
            return Response(status_code=204)

        @router.post(f"{wire.PREFIX}/deregister")
        async def deregister(http: Request) -> Response:
            registration = await self._registration(http)
            self.membership.deregister(registration.worker_id, registration.url)
            return Response(status_code=204)

        return router

    def best_worker(self, request: GenerationRequest) -> str:
        """The id of the worker that a request would go to now; "" while there is none."""
        decided = self.engine.decide(request) if self.engine is not None else None
        return "" if decided is None else decided[0].worker_id

    async def check_secret(self, http: Request) -> None:
        """Raises UnauthorizedError for a request without the cluster's secret."""
        check_cluster_secret(http.headers, self._secret)

    async def _registration(self, http: Request) -> wire.Registration:
        """Raises RequestError for a body that is none."""
        await self.check_secret(http)
        try:
            registration = wire.decode(await http.body(), wire.Registration)
        except WireError as error:
            raise RequestError(str(error)) from error
        if not registration.url.startswith(("http://", "https://")):
            raise RequestError(f"url is {registration.url!r}; it must begin with http:// or https://", param="url")
        return registration

    @property
    def workers(self) -> Sequence[RoutedWorker]:
        """All, by id."""
        foreign = () if self.fleet is None else self.fleet.workers
        return sorted([*self.membership.workers, *foreign], key=lambda worker: (worker.worker_id, worker.url))

    def _workers_json(self) -> list[dict[str, Any]]:
        return [self._worker_json(each) for each in self.workers]

    def _worker_json(self, worker: RoutedWorker) -> dict[str, Any]:
        silent = self.membership.silent_seconds(worker)
        report = worker.report if isinstance(worker, Worker) else None
        foreign = worker.as_json() if isinstance(worker, ForeignWorker) else None
        return {
            "worker_id": worker.worker_id,
            "url": worker.url,
            "status": worker.status.value,
            "detail": worker.detail,
            "index": worker.index,
            "silent_seconds": None if silent is None else round(silent, 3),
            "requests": worker.requests,
            "lost": worker.lost,
            "running": len(worker.running),
            "background": worker.background,
            "shared_tiers": {name: each.hex() for name, each in worker.shared.items()},
            "load": None if report is None else load_json(report),
            "foreign": foreign,
        }

    def _changed(self) -> None:
        models = {} if self.fleet is None else self.fleet.models
        served = f"{', '.join(models)} by foreign workers" if models else ""
        is_idle = any(worker.status is WorkerStatus.IDLE for worker in self.membership.workers)
        self.lifecycle.has_workers(bool(self.membership.up or models), served, is_idle=is_idle)

    async def _has_model(self, worker: Worker, description: wire.WorkerDescription) -> None:
        """The first worker has said what it serves, which the gateway serves from now on."""
        files = await worker.connection.tokenizer()
        assert files is not None, "without an etag the files are always sent"
        tokenizer = await asyncio.to_thread(self._load_tokenizer, files)
        self.engine = ClusterEngine(self.membership, description, in_flight=self.in_flight, clock=self._clock)
        output_format = chosen_output_format(tokenizer, *self._parsers)
        self.lifecycle.loaded(
            ServedModel(
                description.names,
                description.created,
                self.engine,
                tokenizer,
                public=self.engine.public,
                about=description.about,
                sampling_defaults=description.sampling_defaults,
                headers=self._headers,
                first_difference=self._first_difference,
                answering_workers=self.engine,
                on_overflow=self._on_overflow,
                name_patterns=NamePatterns(description.name_patterns),
                output_format=output_format,
                rewrites_turns=rewrites_turns(tokenizer, reasons=output_format.reasoning is not None),
                takes_borders=description.takes_borders,
            )
        )
        self._changed()
        _log.info("the workers serve %s, as worker %s says", description.names[0], description.worker_id)

    async def _first_difference(self, request_id: str) -> int | None:
        """Where a request's prompt first differed, as the worker says that has begun its answer."""
        route = self.engine.route(request_id) if self.engine is not None else None
        worker = None if route is None or not route.workers else self.membership.named(route.workers[0])
        if worker is None:
            return None
        (outcome,) = (await operate([worker], ExplainRequest(request_id))).values()
        return None if isinstance(outcome, EmberError) else first_difference(outcome)

    def _headers(self, request_id: str) -> Mapping[str, str]:
        route = self.engine.route(request_id) if self.engine is not None else None
        return {} if route is None or route.decision is None else {ROUTE_HEADER: route_header(route)}


def tokenizer_of(files: wire.TokenizerFiles) -> "HFTokenizer":
    """The tokenizer that a worker has. It imports transformers, in about 1.2 s and 40 MB, and no torch."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - takes a second

    from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory(prefix="emberkv-tokenizer-") as folder:
        for name, content in files.files.items():
            if Path(name).name != name:
                raise WireError(f"a tokenizer's file is called {name!r}; a name without folders is expected")
            (Path(folder) / name).write_bytes(content)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return HFTokenizer(tokenizer, chat_problem=files.chat_problem)


class GatewayCollector(Collector):
    """Metrics of the workers as the gateway sees them, and of what it did where they failed."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        # of several with one id, of which one alone is compatible, that one
        known = sorted(self._gateway.workers, key=lambda each: each.slot is not None)
        workers = list({each.worker_id: each for each in known if each.worker_id}.values())
        yield _statuses(workers)
        yield from self._gauges(workers)
        yield from _counters(workers)
        if self._gateway.engine is not None:
            yield from _outcomes(self._gateway.engine)

    def _gauges(self, workers: Sequence[RoutedWorker]) -> Iterator[Metric]:
        membership = self._gateway.membership
        yield _by_worker(
            "emberkv_worker_up",
            "1 while the worker gets requests.",
            {worker.worker_id: worker.status is WorkerStatus.UP for worker in workers},
        )
        yield _by_worker(
            "emberkv_worker_cached_blocks",
            "Free blocks of the worker's pool that hold cached prefixes, as it last reported.",
            {
                worker.worker_id: worker.report.cached_blocks
                for worker in workers
                if isinstance(worker, Worker) and worker.report is not None
            },
        )
        yield _by_worker(
            "emberkv_worker_index_exact",
            "1 while the gateway's index has just what the worker's pool has; 0: it is an estimate.",
            {worker.worker_id: worker.exact for worker in workers},
        )
        yield _by_worker(
            "emberkv_worker_foreign",
            "1 for a worker that is known by the OpenAI API alone.",
            {worker.worker_id: isinstance(worker, ForeignWorker) for worker in workers},
        )
        yield _by_worker(
            "emberkv_worker_silent_seconds",
            "Since the worker last sent anything.",
            {each.worker_id: silent for each in workers if (silent := membership.silent_seconds(each)) is not None},
        )
        yield _by_worker(
            "emberkv_worker_running",
            "Requests of this gateway that the worker answers.",
            {worker.worker_id: len(worker.running) for worker in workers},
        )


def _statuses(workers: Sequence[RoutedWorker]) -> Metric:
    status = GaugeMetricFamily(
        "emberkv_worker_status", "1 for the status that a worker has, else 0.", labels=["worker", "status"]
    )
    for worker in workers:
        for each in WorkerStatus:
            status.add_metric([worker.worker_id, each.value], worker.status is each)
    return status


def _counters(workers: Sequence[RoutedWorker]) -> Iterator[Metric]:
    foreign = [worker for worker in workers if isinstance(worker, ForeignWorker)]
    for name, text, counts in (
        (
            "prompt_tokens",
            "Tokens of prompts, as foreign workers that also say how many were cached have said.",
            {each.worker_id: each.prompt_tokens for each in foreign},
        ),
        ("cached_tokens", "Of these, tokens that were cached.", {e.worker_id: e.cached_tokens for e in foreign}),
        ("requests", "Requests sent to the worker.", {each.worker_id: each.requests for each in workers}),
        ("lost_requests", "Of these, requests that it did not finish.", {e.worker_id: e.lost for e in workers}),
        (
            "background_requests",
            "Next prompts of conversations that the worker was sent while it had nothing to do.",
            {each.worker_id: each.background for each in workers},
        ),
    ):
        counter = CounterMetricFamily(f"emberkv_worker_{name}", text, labels=["worker"])
        for worker_id, count in counts.items():
            counter.add_metric([worker_id], count)
        yield counter


def _outcomes(engine: ClusterEngine) -> Iterator[Metric]:
    """What the router decided, and what became of requests whose worker failed."""
    decisions = CounterMetricFamily(
        "emberkv_gateway_decisions", "Decisions of the router, by the reason of the policy.", labels=["why"]
    )
    for reason, count in engine.decisions.items():
        decisions.add_metric([reason.value], count)
    yield decisions
    yield CounterMetricFamily(
        "emberkv_gateway_retried_requests",
        "Requests sent to another worker before their answer had begun.",
        value=engine.retried,
    )
    yield CounterMetricFamily(
        "emberkv_gateway_resumed_answers",
        "Times that an answer went on at another worker.",
        value=engine.resumed,
    )
    yield CounterMetricFamily(
        "emberkv_gateway_refused_requests",
        "Requests refused because the gateway or all workers had too many, or no worker was up.",
        value=engine.refused,
    )


def _by_worker(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["worker"])
    for worker_id, value in values.items():
        family.add_metric([worker_id], value)
    return family


class GatewayServer(HttpServer):
    """Serves a gateway's app, and follows its workers meanwhile."""

    def __init__(self, app: Any, gateway: Gateway, bound: socket.socket, **settings: Any) -> None:
        super().__init__(app, gateway.lifecycle, bound, **settings)
        self._gateway = gateway

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._gateway.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self._gateway.stop()
