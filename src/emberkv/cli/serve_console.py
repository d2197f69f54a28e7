"""What ``emberkv serve`` says: its log, and one screen on how to talk to the server."""

import json
import logging
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emberkv.cli import telling
from emberkv.config import ServeConfig
from emberkv.serving.request_log import JsonFormatter, TextFormatter

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.loader import LoadedModel as ModelOnDevice

_HANDLER = "emberkv serve"

console = Console(stderr=True)
"""Silent while the log is JSON, which then is alone on its stream."""

_log = logging.getLogger("emberkv.serve")


def set_up_logging(log_format: str | None, level: str = "info") -> None:
    """Log to stderr, as JSON alone for the format "json", else as text. A second call replaces the first's settings."""
    console.quiet = log_format == "json"
    handler = logging.StreamHandler()
    handler.name = _HANDLER
    handler.setFormatter(JsonFormatter() if console.quiet else TextFormatter(terminal=console.is_terminal))
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if each.name == _HANDLER]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(console.quiet)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def print_error(message: str) -> None:
    """Say why the server does not start or has stopped."""
    if console.quiet:
        _log.error("%s", message)
    else:
        telling.print_error(message)


def print_summary(
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
        "kernels": _kernels_line(engine),
        "prefix cache": f"{cache}, eviction {config.eviction}, prefill chunks of {config.prefill_chunk}",
        "tiers": _tiers_line(config),
        "listening": f"{url}  (OpenAI: {url}/v1, Anthropic: {url})",
        "health": "/health  /ready  /metrics",
        "ready in": ready,
    }
    if console.quiet:
        fields = {label.lower().replace(" ", "_"): text for label, text in rows.items()}
        _log.info("ready", extra={"fields": {"message": "ready", "url": url, **fields}})
        return
    for label, text in rows.items():
        table.add_row(f"[bold]{label}[/]", escape(text))
    console.print(table)
    curl = _curl_line(url, name, bool(config.api_keys or config.api_key_file or config.tenants))
    console.print(f"\nTry it:\n{curl}", soft_wrap=True, highlight=False, markup=False)


def _kernels_line(engine: "AssembledEngine") -> str:
    kernels = engine.executor.kernels
    if kernels is None:
        return "torch"
    reuse = "decoded KV is exact" if engine.executor.uniform else "decoded KV is not exact"
    return f"C++, vectors of {kernels.lanes}; {reuse}"


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
