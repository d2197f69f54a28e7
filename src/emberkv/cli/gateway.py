"""``emberkv gateway``: one address for many workers."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated

import typer
from starlette.types import ASGIApp

from emberkv.cli import serve_options as options
from emberkv.cli.serve import (
    connection_settings,
    errors_end_the_server,
    new_file,
    recording,
    serving_settings,
    settings_given,
    warn_of_keys_in_arguments,
)
from emberkv.cli.startup import gc_frozen, set_up_logging
from emberkv.cluster.cluster_engine import MAX_REQUESTS
from emberkv.cluster.decision_log import DecisionLog, recorder_until_full
from emberkv.cluster.foreign.prompts import PromptReader, model_tokenizer
from emberkv.cluster.foreign.worker import ForeignSpec
from emberkv.cluster.gateway import Gateway, GatewayServer, tokenizer_of
from emberkv.cluster.loop_clock import LoopClock
from emberkv.cluster.routing import DEFAULT_ROUTING, ROUTER_NAMES, Recorder
from emberkv.config import ServeConfig
from emberkv.errors import ConfigError
from emberkv.serving.app import ServingSettings, create_app
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.parsing.formats import chosen_format
from emberkv.serving.sequence_api import answer_unknown_paths_in_detail
from emberkv.serving.server import bind_socket
from emberkv.serving.tenancy import ServerKeys, Tenants, declare_tenants, read_keys, server_keys
from emberkv.serving.trace_recorder import TraceRecorder
from emberkv.settings import read_settings

if TYPE_CHECKING:  # an extra
    from emberkv.cluster.wire import TokenizerFiles
    from emberkv.cluster.worker_client import Deadlines
    from emberkv.engine.tokenization.hf_tokenizer import HFTokenizer

_log = logging.getLogger(__name__)

WORKER_TIMEOUT = 5.0


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder or hub id, whose tokenizer is used for foreign workers. emberkv workers send theirs.",
    ),
]
Worker = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        rich_help_panel=options.CLUSTER,
        help="A worker, such as http://127.0.0.1:8081; repeat for more. Others register themselves.",
    ),
]
ForeignWorker = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL[,NAME=VALUE]",
        rich_help_panel=options.CLUSTER,
        help="A server with the OpenAI API, such as http://127.0.0.1:8000; repeat for more. With commas between: "
        "id=NAME, tokens=N (capacity of its cache), ttl=SECONDS, api-key-file=FILE, and for vLLM's KV events "
        "kv-events=tcp://HOST:5557 and kv-replay=tcp://HOST:5558.",
    ),
]
Routing = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=options.CLUSTER, help=f"{', '.join(ROUTER_NAMES)}.")
]
WorkerTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=options.CLUSTER,
        help="A worker that sends nothing for so long gets no requests, and its answers go on at others.",
    ),
]
MaxRequests = Annotated[
    int,
    typer.Option(rich_help_panel=options.CLUSTER, min=1, help="Requests at once; more get status 429."),
]
GatewayCount = Annotated[
    int,
    typer.Option(
        rich_help_panel=options.CLUSTER,
        min=1,
        metavar="N",
        help="How many gateways share the load evenly; each enforces 1/N of each tenant's limits.",
    ),
]
KVRoutes = Annotated[
    bool,
    typer.Option(
        "--kv-routes",
        rich_help_panel=options.CLUSTER,
        help="Add the routes by sequence, /kv, /generate and /stats, and the coordinator's.",
    ),
]
RecordDecisions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=options.LOGS,
        help="Write a line of JSON for each routing decision, with all of its inputs and no text. "
        "'emberkv simulate --replay-decisions FILE' repeats them. An earlier file becomes FILE.1.",
    ),
]
MissedRemovals = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=options.CLUSTER,
        help="Keep removals that a worker has missed in this file, so that they are repeated after a restart, too.",
    ),
]
CoordinatorPort = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=options.CLUSTER, min=0, max=65535, help="Answer the coordinator's routes at this port, too."
    ),
]


def gateway(
    model: Model = None,
    worker: Worker = None,
    foreign_worker: ForeignWorker = None,
    cluster_secret_file: options.ClusterSecretFile = None,
    routing: Routing = DEFAULT_ROUTING,
    worker_timeout: WorkerTimeout = WORKER_TIMEOUT,
    max_requests: MaxRequests = MAX_REQUESTS,
    gateway_count: GatewayCount = 1,
    kv_routes: KVRoutes = False,
    record_decisions: RecordDecisions = None,
    missed_removals: MissedRemovals = None,
    coordinator_port: CoordinatorPort = None,
    host: options.Host = None,
    port: options.Port = None,
    api_key: options.ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    tenants: options.Tenants = None,
    max_body: options.MaxBody = None,
    max_connections: options.MaxConnections = None,
    drain_seconds: options.DrainSeconds = None,
    on_overflow: options.OnOverflow = None,
    tool_parser: options.ToolParser = None,
    reasoning_parser: options.ReasoningParser = None,
    admin_key: options.AdminKey = None,
    admin_key_file: options.AdminKeyFile = None,
    metrics_key: options.MetricsKey = None,
    metrics_key_file: options.MetricsKeyFile = None,
    canonical: options.Canonical = None,
    agent_rules: options.AgentRules = None,
    answer_memory: options.AnswerMemory = None,
    next_turn_tokens: options.NextTurnTokens = None,
    record_trace: options.RecordTrace = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    cors_origin: options.CorsOrigin = None,
    root_path: options.RootPath = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
    config: options.ConfigFile = None,
) -> None:
    """Serve the APIs of emberkv over many workers: each request goes where its first token is expected soonest.

    A worker is 'emberkv serve' with the same cluster secret. The gateway needs no model files and no PyTorch. A foreign
    worker is any server of the OpenAI API (vLLM, llama.cpp, emberkv): chats and completions are forwarded to it.
    """
    given = settings_given(locals())
    for name in GATEWAY_ONLY:
        del given[name]
    with errors_end_the_server(log_format):
        settings = read_settings(given, os.environ, config).config
        set_up_logging(settings.log_format, settings.log_level)
        chosen = GatewayOptions(
            workers=tuple(worker or ()),
            foreign=tuple(map(ForeignSpec.parse, foreign_worker or ())),
            model=model,
            routing=routing,
            worker_timeout=worker_timeout,
            max_requests=max_requests,
            gateway_count=gateway_count,
            kv_routes=kv_routes,
            coordinator_port=coordinator_port,
            missed_removals=missed_removals,
        )
        chosen.check(settings)
        warn_of_keys_in_arguments(given)
        with _recording_decisions(record_decisions, routing) as record:
            run_gateway(settings, chosen, record)


GATEWAY_ONLY = (
    "model", "worker", "foreign_worker", "routing", "worker_timeout", "gateway_count", "kv_routes", "record_decisions",
    "missed_removals", "coordinator_port", "config",
)  # fmt: skip
"""Options that are no fields of `ServeConfig`, or that mean something else there."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """The settings that only a gateway has. model: whose tokenizer is for foreign workers' prompts; None: they are
    compared as text, where no worker has sent one. coordinator_port: 0 is a free one; None: there is none.
    """

    workers: tuple[str, ...]
    foreign: tuple[ForeignSpec, ...]
    model: str | None
    routing: str
    worker_timeout: float
    max_requests: int
    gateway_count: int
    kv_routes: bool
    coordinator_port: int | None
    missed_removals: Path | None

    def deadlines(self, clock: LoopClock) -> "Deadlines":
        """Of requests to workers."""
        from emberkv.cluster.worker_client import Deadlines  # noqa: PLC0415 - an extra

        seconds = self.worker_timeout
        return Deadlines(connect=min(2.0, seconds), answer=2 * seconds, silence=seconds, clock=clock)

    def check(self, config: ServeConfig) -> None:
        """Raises ConfigError for values that cannot be, alone or with the settings of any server."""
        has_secret = config.cluster_secret is not None or config.cluster_secret_file is not None
        if not has_secret and (self.workers or not self.foreign):
            raise ConfigError("a gateway needs the secret of its workers; give --cluster-secret-file FILE")
        for url in self.workers:
            if not re.fullmatch(r"https?://[^/\s]+/?", url):
                raise ConfigError(f"--worker {url!r}: use a URL such as http://127.0.0.1:8081")
        if not 0.1 <= self.worker_timeout <= 3600:
            raise ConfigError(f"--worker-timeout {self.worker_timeout}: use a number of seconds from 0.1 to 3600")


@contextmanager
def _recording_decisions(path: Path | None, routing: str) -> Iterator[Recorder | None]:
    """Writes routing decisions to ``path`` until the context ends, or until it cannot be written any more."""
    if path is None:
        yield None
        return
    with os.fdopen(new_file("--record-decisions", path), "wb", buffering=0) as file:  # a killed gateway loses no line
        yield recorder_until_full(
            DecisionLog(file, routing),
            lambda error: _log.error("routing decisions are recorded no more: %s: %s", path, error.strerror),
        )


def run_gateway(config: ServeConfig, options: GatewayOptions, record: Recorder | None = None) -> None:
    """Serve until a signal to stop. record: takes each routing decision. Raises EmberError when it cannot start."""
    chosen_format(None, config.tool_parser, config.reasoning_parser)  # refuses unknown names
    _require_extra()
    lifecycle = Lifecycle()
    keys = server_keys(config)
    tenants = declare_tenants(config, keys.api, os.environ)
    clock = LoopClock()
    deadlines = options.deadlines(clock)
    gateway = _gateway(lifecycle, config, options, keys, tenants, deadlines, clock, record)
    with recording(config.record_trace, config.block_size, lifecycle.background) as recorder:
        if options.foreign:
            _add_foreign(gateway, config, options, deadlines, recorder, forwards_keys=not tenants.by_key)
        bound = [bind_socket(config.host, config.port)]
        settings = serving_settings(config, bound[0], tenants, keys, recorder)
        # the gateway bounds what is in flight, by tenants' weights
        settings = replace(settings, max_requests=None, gateways=options.gateway_count)
        if options.coordinator_port is not None:
            bound.append(bind_socket(config.host, options.coordinator_port))
        with gc_frozen():
            app = _app(lifecycle, settings, gateway, options, bound)
        server = GatewayServer(app, gateway, bound[0], **connection_settings(config))
        _log.info("the gateway is listening  %s", server.url)
        with server.capture_signals(until_exit=True):
            server.run(bound)
        if settings.tracer is not None:
            settings.tracer.close()
        _log.info("stopped")


def _require_extra() -> None:
    try:
        import emberkv.cluster.sequence_routes  # noqa: PLC0415 - an extra
        import emberkv.cluster.worker_client  # noqa: F401, PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a gateway needs the cluster extra ({error.name} is missing): pip install '.[cluster]' in emberkv's folder"
        ) from error


def _gateway(
    lifecycle: Lifecycle,
    config: ServeConfig,
    options: GatewayOptions,
    keys: ServerKeys,
    tenants: Tenants,
    deadlines: "Deadlines",
    clock: LoopClock,
    record: Recorder | None,
) -> Gateway:
    from emberkv.cluster.worker_client import WorkerClient  # noqa: PLC0415 - an extra

    return Gateway(
        lifecycle,
        lambda url: WorkerClient(url, keys.cluster or "", deadlines=deadlines),
        secret=keys.cluster,
        workers=options.workers,
        routing=options.routing,
        max_requests=options.max_requests,
        weights=tenants.all_weights,
        on_overflow=config.on_overflow,
        parsers=(config.tool_parser, config.reasoning_parser),
        record=record,
        missed_removals=options.missed_removals,
        clock=clock,
        load_tokenizer=frozen_tokenizer,
    )


def frozen_tokenizer(files: "TokenizerFiles") -> "HFTokenizer":
    """As `tokenizer_of`, with the libraries that it imports left alone by the garbage collector, too."""
    with gc_frozen():
        return tokenizer_of(files)


def _app(
    lifecycle: Lifecycle,
    settings: ServingSettings,
    gateway: Gateway,
    options: GatewayOptions,
    bound: Sequence[socket],
) -> ASGIApp:
    """The gateway's routes, and at the second of the ``bound`` sockets, where there is one, the coordinator's."""
    from emberkv.cluster.sequence_routes import (  # noqa: PLC0415 - an extra
        ByPort,
        FollowedMembers,
        SequenceGateway,
        coordinator_app,
    )

    members = FollowedMembers(gateway.membership)
    sequences = SequenceGateway(members, gateway.check_secret, best=gateway.best_worker)
    gateway.on_stop.append(sequences.close)
    by_sequence = [sequences.routes] if options.kv_routes else []
    app = create_app(lifecycle, settings, routers=[*by_sequence, gateway.routes])
    if options.kv_routes:
        answer_unknown_paths_in_detail(app)
    if len(bound) == 1:
        return app
    port = bound[1].getsockname()[1]
    _log.info("the coordinator's routes are at port %d", port)
    return ByPort(app, port, coordinator_app(members, gateway.check_secret))


def _add_foreign(
    gateway: Gateway,
    config: ServeConfig,
    options: GatewayOptions,
    deadlines: "Deadlines",
    recorder: TraceRecorder | None,
    *,
    forwards_keys: bool,
) -> None:
    """Have the gateway forward requests to foreign workers. forwards_keys: clients' keys are the workers'."""
    from emberkv.cluster.foreign.client import ForeignClient  # noqa: PLC0415 - an extra

    has_tokens = options.model is not None or bool(options.workers)
    if not has_tokens and (with_events := next((each for each in options.foreign if each.kv_events), None)):
        raise ConfigError(
            f"--foreign-worker {with_events.url},kv-events=...: events name tokens, so that the model's tokenizer is "
            "needed; name the model, as in: emberkv gateway MODEL --foreign-worker ..."
        )
    if any(each.kv_events for each in options.foreign) and find_spec("zmq") is None:
        raise ConfigError(
            "kv-events needs the cluster extra (pyzmq is missing): pip install '.[cluster]' in emberkv's folder"
        )
    keys = {spec: read_keys("api-key-file", spec.api_key_file)[0] for spec in options.foreign if spec.api_key_file}
    reader = PromptReader(
        tokenizer=None if options.model is None else model_tokenizer(options.model),
        model=options.model or "",
        block_size=config.block_size,
    )

    def client(spec: ForeignSpec) -> ForeignClient:
        return ForeignClient(spec.url, key=keys.get(spec), forwards_keys=forwards_keys, deadlines=deadlines)

    gateway.add_foreign(options.foreign, client, reader, recorder)
