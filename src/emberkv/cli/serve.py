"""``emberkv serve``: the server that its options describe, and the recording of its requests."""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from socket import socket
from threading import Thread
from typing import Any, TypedDict
from urllib.parse import urlsplit

import typer

from emberkv.cli import serve_options as options
from emberkv.cli.command import USAGE_EXIT_CODE
from emberkv.cli.startup import Startup, print_error, set_up_logging
from emberkv.cluster import wire
from emberkv.cluster.registration import Registrar, WorkerServer
from emberkv.cluster.worker_api import worker_routes
from emberkv.config import ClusterSettings, ListenSettings, ServeConfig
from emberkv.errors import ConfigError, EmberError
from emberkv.serving.app import RouterFactory, ServingSettings, create_app
from emberkv.serving.auth import is_loopback, is_own_user
from emberkv.serving.background import Background
from emberkv.serving.canonical import rules_in_force
from emberkv.serving.generate_api import worker_routers
from emberkv.serving.kv_tensors import KVTensorStore
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.parsing.formats import chosen_format
from emberkv.serving.sequence_api import answer_unknown_paths_in_detail
from emberkv.serving.server import ConnectionLimits, HttpServer, bind_socket, openable_connections
from emberkv.serving.tenancy import ServerKeys, Tenants, declare_tenants, server_keys
from emberkv.serving.trace_recorder import KEY_BYTES, RecordedRequest, TraceRecorder
from emberkv.serving.tracing import RequestTracer
from emberkv.settings import ENV_PREFIX, read_settings
from emberkv.sim.model_spec import DEMO_NAME
from emberkv.workload.ember_trace import Header, TraceLine

_log = logging.getLogger(__name__)

NOTE = "recorded by emberkv serve; block ids are keyed, and tell nothing of any text"


@contextmanager
def recording(
    path: Path | None, block_size: int, background: Background, model: str = ""
) -> Iterator[TraceRecorder | None]:
    """A recorder that writes to ``path`` until the context ends; None without a path.

    model: what serves: a folder, a hub id or the bundled model's name. The file is made by `new_file`.
    """
    if path is None:
        yield None
        return
    with os.fdopen(new_file("--record-trace", path), "w", encoding="utf-8") as file:
        file.write(Header(emberkv_trace=1, note=NOTE, model=model).model_dump_json() + "\n")
        file.flush()

        def write(recorded: RecordedRequest) -> None:
            file.write(line_of(recorded).model_dump_json(exclude_defaults=True) + "\n")
            file.flush()

        key = secrets.token_bytes(KEY_BYTES)
        work = background.work("trace recorder")
        recorder = TraceRecorder(write, block_size=block_size, key=key, clock=time.monotonic, work=work)
        try:
            yield recorder
        finally:
            recorder.close()


def new_file(option: str, path: Path) -> int:
    """The descriptor of a new file, for this user only, that ``option`` names. A file that is there already gets the
    first free of the names ``path.1``, ``path.2``, and so on. Raises ConfigError where no file can be written.
    """
    try:
        _move_aside(option, path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{option} is {str(path)!r}, which cannot be written: {error.strerror}") from error


def _move_aside(option: str, path: Path) -> None:
    """Raises ConfigError for what is no plain file, OSError for one that cannot be moved."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise ConfigError(f"{option} {path} is no plain file; name a new file, or one of an earlier recording")
    for number in count(1):
        try:
            os.link(path, f"{path}.{number}")
        except FileExistsError:
            continue
        path.unlink()
        _log.info("the earlier recording is now %s.%d", path, number)
        return


def line_of(recorded: RecordedRequest) -> TraceLine:
    after = recorded.after and {"request": recorded.after.request, "think_time": round(recorded.after.think_time, 6)}
    return TraceLine.model_validate(
        {
            "request": recorded.request,
            "arrival": round(recorded.arrival, 6),
            "client": recorded.client,
            "session": recorded.session,
            "turn": recorded.turn,
            "prompt_tokens": recorded.prompt_tokens,
            "output_tokens": recorded.output_tokens,
            "max_output_tokens": recorded.max_output_tokens,
            "block_size": recorded.block_size,
            "blocks": list(recorded.blocks),
            "known_tokens": recorded.known_tokens,
            "after": after,
        }
    )


_OPEN_TO_ALL = (
    "listening on %s without an API key: every client that reaches this address may generate, list the model and read "
    "/metrics, and infer from hits and times what others have sent; the routes under /v1/cache are closed. "
    "Give --api-key-file, or listen on 127.0.0.1"
)


def serve(
    model: options.ModelSource = None,
    host: options.Host = None,
    port: options.Port = None,
    served_name: options.ServedName = None,
    strict_names: options.StrictNames = None,
    chat_template: options.ChatTemplate = None,
    tool_parser: options.ToolParser = None,
    reasoning_parser: options.ReasoningParser = None,
    generation_config: options.GenerationConfig = None,
    cache_ram: options.CacheRam = None,
    cache_dir: options.CacheDir = None,
    cache_disk: options.CacheDisk = None,
    ram_tier: options.RamTier = None,
    shm_tier: options.ShmTier = None,
    remote_tier: options.RemoteTier = None,
    remote_tier_bytes: options.RemoteTierBytes = None,
    remote_tier_ttl: options.RemoteTierTtl = None,
    remote_tier_password_file: options.RemoteTierPasswordFile = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    kv_dtype: options.KVDtype = None,
    device: options.Device = None,
    kernels: options.Kernels = None,
    self_check: options.SelfCheck = None,
    exact: options.Exact = None,
    prefix_cache: options.PrefixCache = None,
    prefill_chunk: options.PrefillChunk = None,
    block_size: options.BlockSize = None,
    max_step_tokens: options.MaxStepTokens = None,
    max_running: options.MaxRunning = None,
    eviction: options.Eviction = None,
    api_key: options.ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    tenants: options.Tenants = None,
    max_body: options.MaxBody = None,
    max_connections: options.MaxConnections = None,
    request_timeout: options.RequestTimeout = None,
    drain_seconds: options.DrainSeconds = None,
    max_requests: options.MaxRequests = None,
    on_overflow: options.OnOverflow = None,
    warmup: options.Warmup = None,
    warmup_timeout: options.WarmupTimeout = None,
    warmup_system_file: options.WarmupSystemFile = None,
    warmup_request: options.WarmupRequest = None,
    warmup_required: options.WarmupRequired = None,
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
    trace_unit: options.TraceUnit = None,
    cors_origin: options.CorsOrigin = None,
    root_path: options.RootPath = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    cluster_secret_file: options.ClusterSecretFile = None,
    worker_url: options.WorkerUrl = None,
    gateway: options.Gateway = None,
    log_level: options.LogLevel = None,
    log_format: options.LogFormat = None,
    worker_id: options.WorkerId = None,
    kv_routes: options.KVRoutes = None,
    kv_max_bytes: options.KVMaxBytes = None,
    kv_max_entries: options.KVMaxEntries = None,
    model_on_demand: options.ModelOnDemand = None,
    config: options.ConfigFile = None,
    print_config: options.PrintConfig = False,
) -> None:
    """Serve a model over the OpenAI and Anthropic HTTP APIs, with a verified prefix cache.

    Every option can also be set in the environment, as EMBERKV_CACHE_RAM=4GiB, and in a configuration file (--config),
    as cache-ram: 4GiB. Options take precedence over the environment, and the environment over the file.
    """
    given = settings_given(locals())
    print_config, config = given.pop("print_config"), given.pop("config")
    with errors_end_the_server(log_format):
        settings = read_settings(given, os.environ, config)
        if print_config:
            typer.echo(settings.as_yaml(), nl=False)
            return
        set_up_logging(settings.config.log_format, settings.config.log_level)
        warn_of_keys_in_arguments(given)
        run_server(settings.config)


def settings_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line gave, by the names of `ServeConfig`: options that may be repeated are lists there."""
    given = dict(options)
    for option, setting in _REPEATED.items():
        if option in given:
            given[setting] = given.pop(option) or None
    return given


_REPEATED = {
    "api_key": "api_keys", "served_name": "served_names", "gateway": "gateways", "cors_origin": "cors_origins",
    "warmup_system_file": "warmup_system_files", "warmup_request": "warmup_requests",
}  # fmt: skip


@contextmanager
def errors_end_the_server(log_format: str | None) -> Iterator[None]:
    """Reports an EmberError in the server's log or on the terminal, and exits. log_format: the option, before any
    setting is read.
    """
    set_up_logging(log_format or os.environ.get(f"{ENV_PREFIX}LOG_FORMAT"))  # for warnings about the settings
    try:
        yield
    except EmberError as error:
        print_error(str(error))
        raise typer.Exit(USAGE_EXIT_CODE) from error


def warn_of_keys_in_arguments(given: Mapping[str, Any]) -> None:
    """given: what the command line gave, by the names of `ServeConfig`."""
    options = {"api_keys": "--api-key", "admin_key": "--admin-key", "metrics_key": "--metrics-key"}
    for name, option in options.items():
        if given.get(name):
            variable = f"{ENV_PREFIX}{name.upper()}"
            _log.warning(
                "other users can read %s in the list of processes; use %s-file or %s", option, option, variable
            )


def sequence_routers(config: ClusterSettings, worker_id: str) -> list[RouterFactory]:
    """The routes that --kv-routes adds."""
    if not config.kv_routes:
        return []
    store = KVTensorStore(max_bytes=int(config.kv_max_bytes), max_entries=config.kv_max_entries)
    return worker_routers(store, worker_id)


def run_server(config: ServeConfig) -> None:
    """Serve until a signal to stop. Raises EmberError when the server cannot start."""
    chosen_format(None, config.tool_parser, config.reasoning_parser)  # refuses unknown names before the model is loaded
    lifecycle = Lifecycle()
    keys = server_keys(config)
    tenants = declare_tenants(config, keys.api, os.environ)
    served = str(config.model or DEMO_NAME)
    unit = config.trace_unit or config.block_size
    with recording(config.record_trace, unit, lifecycle.background, served) as recorder:
        bound = bind_socket(config.host, config.port)
        settings = serving_settings(config, bound, tenants, keys, recorder)
        server = http_server(config, lifecycle, settings, bound, keys.cluster)
        if config.kv_routes and config.model_on_demand:  # a gateway does not wait while the first tensor imports it
            Thread(target=import_module, args=("torch",), name="import torch").start()
        startup = Startup(config, lifecycle, server, tenants, settings.canonical)
        with server.capture_signals(until_exit=True):
            startup.begin()
            server.run()
            startup.finish()
        if settings.tracer is not None:
            settings.tracer.close()
        _log.info("stopped")


def http_server(
    config: ServeConfig, lifecycle: Lifecycle, settings: ServingSettings, bound: socket, secret: str | None
) -> HttpServer:
    """The server, which is a worker of a cluster where there is a ``secret``, and registers at the gateways given."""
    host, port = bound.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    worker_id = config.worker_id or (urlsplit(config.worker_url).netloc if config.worker_url else address)
    routers = [*sequence_routers(config, worker_id), *([] if secret is None else [worker_routes(worker_id, secret)])]
    app = create_app(lifecycle, settings, routers=routers)
    if config.kv_routes:
        answer_unknown_paths_in_detail(app)
    if secret is None or not config.gateways:
        return HttpServer(app, lifecycle, bound, **connection_settings(config))
    if config.worker_url is None and host in ("0.0.0.0", "::"):  # noqa: S104 - it is refused, not listened on
        raise ConfigError(
            f"--gateway needs --worker-url with --host {host}: give the address that gateways reach it by"
        )
    url = config.worker_url or f"{'https' if config.tls_cert else 'http'}://{address}"
    registrar = Registrar(wire.Registration(worker_id=worker_id, url=url), config.gateways, secret)
    return WorkerServer(app, lifecycle, bound, registrar, **connection_settings(config))


def serving_settings(
    config: ServeConfig, bound: socket, tenants: Tenants, keys: ServerKeys, recorder: TraceRecorder | None
) -> ServingSettings:
    """What the app of a server on ``bound`` is set to. It warns of one that all may use."""
    rules = rules_in_force(config.canonical, for_agents=config.agent_rules)
    settings = ServingSettings(
        max_body_bytes=None if config.max_body is None else int(config.max_body),
        tenants=tenants,
        recorder=recorder,
        canonical=rules,
        admin_key=keys.admin,
        metrics_key=keys.metrics,
        allowed_origins=config.cors_origins,
        root_path=config.root_path,
        request_timeout=config.request_timeout,
        max_requests=config.max_requests,
        answer_memory=config.answer_memory,
        next_turn_tokens=config.next_turn_tokens if config.prefix_cache else 0,
        tracer=None if config.otlp_endpoint is None else RequestTracer.exporting(config.otlp_endpoint),
        bound_to_loopback=is_loopback(bound.getsockname()[0]),
        is_own_user=is_own_user,
    )
    if rules is not None:
        _log.info("canonical rules  %s", ", ".join(rules.names))
    if not (settings.bound_to_loopback or tenants.by_key):
        _log.warning(_OPEN_TO_ALL, config.host)
    return settings


class ConnectionSettings(TypedDict):
    """Of `HttpServer`."""

    drain_seconds: float
    limits: ConnectionLimits
    tls: tuple[Path, Path] | None


def connection_settings(config: ListenSettings) -> ConnectionSettings:
    """How connections are taken: how many, by which certificate, and how long answers may go on at the end."""
    return ConnectionSettings(
        drain_seconds=config.drain_seconds,
        limits=ConnectionLimits(connections=openable_connections(config.max_connections)),
        tls=(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None,
    )
