"""``emberkv serve``: its options, and the server that they describe."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from emberkv.cli.serve_console import console, set_up_logging
from emberkv.cli.startup import Startup
from emberkv.cli.trace_file import recording
from emberkv.config import DEFAULT_PREFILL_CHUNK, ServeConfig, serve_config
from emberkv.errors import EmberError
from emberkv.serving.admin.guard import is_loopback
from emberkv.serving.app import create_app
from emberkv.serving.canonical.rules import load_rules
from emberkv.serving.context import ServingSettings
from emberkv.serving.lifecycle import Lifecycle
from emberkv.serving.server import HttpServer, bind_socket
from emberkv.serving.tenancy.tenants import declare_tenants


def serve(
    model: Annotated[str | None, typer.Argument(help="A model folder or hub id; the bundled demo without one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. (default: 8080)")] = None,
    served_name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    cache_ram: Annotated[
        str | None, typer.Option(help="Size of the KV pool, such as 4GiB. (default: a quarter of the free memory)")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps blocks across restarts, and what else is to last.")
    ] = None,
    cache_disk: Annotated[
        str | None, typer.Option(help="Most that the blocks in --cache-dir may take. (default: 50GiB)")
    ] = None,
    ram_tier: Annotated[
        str | None, typer.Option(help="Host memory for blocks that leave the KV pool. (default: none)")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16. (default: auto)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps. (default: auto)")] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact", help="Reuse only KV state that is bit-equal to a cold prefill's.")
    ] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse prefixes. (default: on)")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help=f"Tokens per prefill pass. (default: {DEFAULT_PREFILL_CHUNK})")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block. (default: 16)")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Token budget of one step. (default: 256)")] = None,
    max_running: Annotated[int | None, typer.Option(help="Requests that run at once. (default: 64)")] = None,
    eviction: Annotated[str | None, typer.Option(help="lru, lfu, fifo, s3fifo or greedy-dual. (default: lru)")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Accept this key; repeat for more.")] = None,
    tenants: Annotated[
        Path | None, typer.Option(help="YAML file of tenants: their keys, floors and quotas, and public prefixes.")
    ] = None,
    max_body: Annotated[str | None, typer.Option(help="Largest request body. (default: 16MiB)")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Patience when asked to stop. (default: 10)")] = None,
    warmup: Annotated[
        bool | None, typer.Option("--warmup/--no-warmup", help="Compute system prompts before the start. (default: on)")
    ] = None,
    warmup_timeout: Annotated[
        str | None, typer.Option(help="Seconds that readiness waits for the warmup, 1 to 300. (default: 60)")
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
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. (default: info)")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. (default: text)")] = None,
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
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def run_server(config: ServeConfig) -> None:
    """Serve until told to stop. Raises EmberError when the server cannot start."""
    set_up_logging(config)
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
        startup = Startup(config, lifecycle, server, tenants, settings.canonical)
        startup.thread.start()
        server.run()
        startup.finish()
