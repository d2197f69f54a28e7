"""What ``emberkv serve`` says: its log, and one screen on how to talk to the server."""

import json
import logging
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from emberkv.config import ServeConfig
from emberkv.serving.request_log import JsonFormatter

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.loader import LoadedModel as ModelOnDevice

console = Console(stderr=True)


def set_up_logging(config: ServeConfig) -> None:
    """To the terminal in colour; to a file or a pipe as one line a message, plain or JSON."""
    handler: logging.Handler = logging.StreamHandler()
    line = "%(asctime)s %(levelname)s %(message)s"
    if config.log_format == "json":
        handler.setFormatter(JsonFormatter())
    elif console.is_terminal:
        handler, line = RichHandler(console=console, show_path=False), "%(message)s"
    logging.basicConfig(level=config.log_level.upper(), format=line, handlers=[handler])
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


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
    for label, text in rows.items():
        table.add_row(f"[bold]{label}[/]", escape(text))
    console.print(table)
    curl = _curl_line(url, name, bool(config.api_keys or config.tenants))
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
