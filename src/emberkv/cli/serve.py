"""``emberkv serve``: load a model, serve it, and say on one screen how to talk to it."""

import json
import logging
import os
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from emberkv.cli.trace_file import recording
from emberkv.config import DEFAULT_PREFILL_CHUNK, ServeConfig, serve_config
from emberkv.core.ledger import Ledger
from emberkv.errors import ConfigError, EmberError
from emberkv.serving.admin_guard import is_loopback
from emberkv.serving.app import create_app
from emberkv.serving.cache_books import CacheBooks
from emberkv.serving.cache_setup import cache_access
from emberkv.serving.canonical import CanonicalRules, load_rules
from emberkv.serving.context import ServingSettings
from emberkv.serving.lifecycle import Lifecycle, LoadedModel, Phase
from emberkv.serving.public_prompts import public_tokens
from emberkv.serving.request_log import JsonFormatter
from emberkv.serving.server import HttpServer, bind_socket
from emberkv.serving.standard_prompts import standard_prompts
from emberkv.serving.tenants import Tenants, declare_tenants
from emberkv.serving.tenants_file import TIERS
from emberkv.serving.warm_start import make_warmup
from emberkv.serving.warmup import Warmup

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.loader import LoadedModel as ModelOnDevice

DEMO_MODEL_NAME = "emberkv-demo"
RETAINED_SHARE = 0.25
"""Of the KV pool, what requests and pins may have evicted last."""

_console = Console(stderr=True)


def serve(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [default: 8080]")] = None,
    served_name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    cache_ram: Annotated[
        str | None, typer.Option(help="Size of the KV pool, such as 4GiB. [default: a quarter of the free memory]")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps blocks across restarts, and what else is to last.")
    ] = None,
    cache_disk: Annotated[
        str | None, typer.Option(help="Most that the blocks in --cache-dir may take. [default: 50GiB]")
    ] = None,
    ram_tier: Annotated[
        str | None, typer.Option(help="Host memory for blocks that leave the KV pool. [default: none]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16. [default: auto]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. [default: auto]")] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact", help="Reuse only KV state that is bit-equal to a cold prefill's.")
    ] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse prefixes. [default: on]")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help=f"Tokens per prefill pass. [default: {DEFAULT_PREFILL_CHUNK}]")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block. [default: 16]")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Token budget of one step. [default: 256]")] = None,
    max_running: Annotated[int | None, typer.Option(help="Requests that run at once. [default: 64]")] = None,
    eviction: Annotated[str | None, typer.Option(help="lru, lfu, fifo, s3fifo or greedy-dual. [default: lru]")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Accept this key; repeat for more.")] = None,
    tenants: Annotated[
        Path | None, typer.Option(help="YAML file of tenants: their keys, floors and quotas, and public prefixes.")
    ] = None,
    max_body: Annotated[str | None, typer.Option(help="Largest request body. [default: 16MiB]")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Patience when asked to stop. [default: 10]")] = None,
    warmup: Annotated[
        bool | None, typer.Option("--warmup/--no-warmup", help="Compute system prompts before the start. [default: on]")
    ] = None,
    warmup_timeout: Annotated[
        str | None, typer.Option(help="Seconds that readiness waits for the warmup, 1 to 300. [default: 60]")
    ] = None,
    warmup_system_file: Annotated[
        list[Path] | None, typer.Option(help="Warm this file's system prompt, not the built-in one; repeat for more.")
    ] = None,
    warmup_required: Annotated[
        bool | None, typer.Option("--warmup-required", help="Not ready before the system prompts are warm.")
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="Key of the routes below /v1/cache; without one, only this machine may use them.")
    ] = None,
    canonical: Annotated[
        Path | None, typer.Option(help="YAML file of rules that drop or move volatile lines of prompts.")
    ] = None,
    record_trace: Annotated[
        Path | None, typer.Option(help="Write a trace of the requests to this new file: times and identities, no text.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [default: text]")] = None,
) -> None:
    """Serve a model over the OpenAI and Anthropic HTTP APIs, with a verified prefix cache.

    Every option can be given as EMBERKV_NAME in the environment, too.
    """
    given = dict(locals())
    given["api_keys"] = given.pop("api_key") or None
    given["warmup_system_files"] = given.pop("warmup_system_file") or None
    try:
        run_server(serve_config(given, os.environ))
    except EmberError as error:
        _console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def run_server(config: ServeConfig) -> None:
    """Serve until told to stop. Raises EmberError when the server cannot start."""
    _set_up_logging(config)
    lifecycle = Lifecycle()
    tenants = declare_tenants(config, os.environ)
    with recording(config.record_trace, config.block_size) as recorder:
        bound = bind_socket(config.host, config.port)
        settings = ServingSettings(
            max_body_bytes=int(config.max_body),
            tenants=tenants,
            recorder=recorder,
            canonical=load_rules(config.canonical) if config.canonical is not None else None,
            admin_key=config.admin_key.get_secret_value() if config.admin_key is not None else None,
            bound_to_loopback=is_loopback(bound.getsockname()[0]),
        )
        server = HttpServer(create_app(lifecycle, settings), lifecycle, bound, drain_seconds=config.drain_seconds)
        startup = _Startup(config, lifecycle, server, tenants, settings.canonical)
        startup.thread.start()
        server.run()
        startup.finish()


class _Startup:
    """Loads the model beside the server, which answers /health and /ready meanwhile."""

    def __init__(
        self,
        config: ServeConfig,
        lifecycle: Lifecycle,
        server: HttpServer,
        tenants: Tenants,
        canonical: CanonicalRules | None,
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._canonical = canonical
        self._lifecycle = lifecycle
        self._server = server
        self._engine: AssembledEngine | None = None
        self._warmup: Warmup | None = None
        self._books = CacheBooks(Ledger())
        self._failure: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="emberkv-startup", daemon=True)

    def finish(self) -> None:
        """Stop the warmup and the engine; raise what kept it from starting."""
        if self._warmup is not None:
            self._warmup.close()
        self.thread.join(timeout=0 if self._failure is None and self._engine is None else None)
        if self._engine is not None:
            self._engine.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            loaded, engine, warmup = self._load()
        except Exception as error:  # noqa: BLE001 - carried over to the main thread, which raises it
            self._failure = error
            self._lifecycle.failed(str(error))
            self._server.stop()
            return
        self._warmup = warmup
        self._engine = engine
        name = self._config.served_name or (DEMO_MODEL_NAME if self._config.model is None else loaded.name)
        cache = cache_access(engine, self._books, name=name, folder=self._config.cache_dir)
        engine.loop.start()
        names = (name,) if name == loaded.name or self._config.model is None else (name, loaded.name)
        model = LoadedModel(names, int(time.time()), engine.loop, loaded.tokenizer, warmup, cache)
        self._lifecycle.loaded(model, warming=True)
        warmup.start()
        warmup.first_pass_ended.wait()
        is_ready = self._lifecycle.phase is Phase.READY
        ready = f"{time.perf_counter() - began:.1f} s" if is_ready else "more time: see /ready"
        _print_summary(self._server.url, name, loaded, engine, self._config, ready)

    def _load(self) -> "tuple[ModelOnDevice, AssembledEngine, Warmup]":
        config = self._config
        with _console.status("importing PyTorch") as status:
            try:
                from emberkv.engine.assembly import EngineConfig, assemble, free_memory  # noqa: PLC0415
                from emberkv.engine.loader import load_model  # noqa: PLC0415
                from emberkv.engine.paged_attention import ATTENTION_NAME  # noqa: PLC0415
                from emberkv.engine.tier_setup import TierConfig  # noqa: PLC0415
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"serving needs the torch extra ({error.name} is missing): pip install 'emberkv[torch]'"
                ) from error
            loaded = load_model(
                config.model or str(files("emberkv") / "demo_model"),
                dtype=config.dtype,
                device=config.device,
                attn_implementation=ATTENTION_NAME,
                progress=lambda line: status.update(escape(line)),
                fingerprint_cache=config.fingerprint_cache or Path("~/.cache/emberkv").expanduser(),
            )
            status.update("allocating the KV pool and checking the attention")
            prompt_files = config.warmup_system_files if config.warmup else None
            prompts, problems = standard_prompts(prompt_files, loaded.tokenizer, self._canonical)
            public = public_tokens(self._tenants.public_prefixes, loaded.tokenizer)
            engine = assemble(
                loaded,
                EngineConfig(
                    cache_bytes=int(config.cache_ram or free_memory(loaded.device) // 4),
                    block_size=config.block_size,
                    prefill_chunk=config.prefill_chunk,
                    max_step_tokens=config.max_step_tokens,
                    max_running=config.max_running,
                    eviction=config.eviction,
                    exact=config.exact,
                    prefix_cache=config.prefix_cache,
                    tiers=TierConfig(
                        ram_bytes=int(config.ram_tier),
                        folder=config.cache_dir,
                        disk_bytes=int(config.cache_disk),
                        shares={tier: self._tenants.shares(tier) for tier in TIERS},
                        retain_share=RETAINED_SHARE,
                    ),
                ),
                public_prefixes=[*(prompt.tokens for prompt in prompts), *public],
                on_crash=lambda error: self._lifecycle.failed(f"the engine stopped: {type(error).__name__}"),
                on_evicted=self._books.evicted,
            )
        warmup = make_warmup(
            config,
            engine,
            self._tenants,
            prompts,
            problems,
            on_ready=self._lifecycle.warmed,
        )
        return loaded, engine, warmup


def _set_up_logging(config: ServeConfig) -> None:
    handler: logging.Handler = RichHandler(console=_console, show_path=False)
    if config.log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=config.log_level.upper(), format="%(message)s", handlers=[handler])
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _print_summary(
    url: str,
    name: str,
    loaded: "ModelOnDevice",
    engine: "AssembledEngine",
    config: ServeConfig,
    ready: str,
) -> None:
    pool = engine.executor.pool
    tokens = pool.num_blocks * pool.block_size
    cache = "off" if not config.prefix_cache else "exact reuse only" if config.exact else "on"
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{name} ({loaded.dtype}, {loaded.device}, context {loaded.context_length:,} tokens)".replace(
            "torch.", ""
        ),
        "KV pool": f"{pool.num_bytes / 2**20:,.0f} MiB: {tokens:,} tokens in blocks of {pool.block_size}",
        "prefix cache": f"{cache}, eviction {config.eviction}, prefill chunks of {config.prefill_chunk}",
        "tiers": _tiers_line(config),
        "listening": f"{url}  (OpenAI: {url}/v1, Anthropic: {url})",
        "health": "/health  /ready  /metrics",
        "ready in": ready,
    }
    for label, text in rows.items():
        table.add_row(f"[bold]{label}[/]", escape(text))
    _console.print(table)
    curl = _curl_line(url, name, bool(config.api_keys or config.tenants))
    _console.print(f"\nTry it:\n{curl}", soft_wrap=True, highlight=False, markup=False)


def _tiers_line(config: ServeConfig) -> str:
    ram = [f"{config.ram_tier.human_readable()} of memory"] if config.ram_tier else []
    disk = [f"{config.cache_disk.human_readable()} in {config.cache_dir}"] if config.cache_dir is not None else []
    return ", ".join(ram + disk) or "none below the pool"


def _curl_line(url: str, name: str, needs_key: bool) -> str:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "What does json.dumps do?"}],
        "max_tokens": 64,
        "temperature": 0.3,
    }
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
