"""What ``emberkv serve`` says: its log, and one screen on how to talk to the server."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emberkv.cli import errors
from emberkv.config import ServeConfig
from emberkv.serving.request_log import JsonFormatter, TextFormatter

if TYPE_CHECKING:
    from emberkv.engine.assembly import AssembledEngine
    from emberkv.engine.torch.model.geometry import ModelGeometry
    from emberkv.engine.torch.model.loader import LoadedModel as ModelOnDevice

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


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """Show which stage of the start is going on, from ``first`` on; what it gives takes the next ones.

    On a terminal it is one line that changes; elsewhere each stage is a line of the log.
    """
    if console.is_terminal and not console.quiet:
        with console.status(first) as status:
            yield lambda line: status.update(escape(line))
    else:
        _log.info("%s", first)
        yield lambda line: _log.info("%s", line)


def print_error(message: str) -> None:
    """Say why the server does not start or has stopped."""
    if console.quiet:
        _log.error("%s", message)
    else:
        errors.print_error(message)


def print_summary(
    url: str,
    name: str,
    loaded: "ModelOnDevice",
    engine: "AssembledEngine",
    config: ServeConfig,
    ready: str,
) -> None:
    pool = engine.executor.pool
    tokens, mib = pool.num_blocks * pool.block_size, pool.num_blocks * pool.block_bytes / 2**20
    cache = "off" if not config.prefix_cache else "exact reuse only" if config.exact else "on"
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{name} ({loaded.dtypes}, {loaded.device})",
        "context": context_line(loaded.geometry, tokens),
        "KV pool": f"{mib:,.0f} MiB: {tokens:,} tokens in blocks of {pool.block_size}",
        "kernels": engine.executor.description,
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
    needs_key = bool(config.api_keys or config.api_key_file or config.tenants)
    curl = curl_line(url, name, needs_key, chats=loaded.tokenizer.chat_problem is None)
    console.print(f"\nTry it:\n{curl}", soft_wrap=True, highlight=False, markup=False)


def _tiers_line(config: ServeConfig) -> str:
    from emberkv.serving.engine_setup import tier_specs  # noqa: PLC0415 - imports PyTorch, which takes seconds

    return ", ".join(map(str, tier_specs(config))) or "none below the pool"


def context_line(geometry: "ModelGeometry", pool_tokens: int) -> str:
    """The most tokens that a prompt and its answer may have, and what limits them below the model's own context."""
    if pool_tokens <= geometry.context_length:
        return f"{pool_tokens:,} tokens: all that the KV pool holds, of the model's {geometry.context_length:,}"
    if geometry.context_length < geometry.stated_context:
        longest = f"{geometry.context_length:,} tokens, of the model's {geometry.stated_context:,}"
        return f"{longest}: beyond these, its RoPE rotates all positions otherwise"
    return f"{geometry.context_length:,} tokens"


def curl_line(url: str, name: str, needs_key: bool, *, chats: bool) -> str:
    """A request to try: a chat, or where the model answers none, a completion."""
    text = "What does json.dumps do?"
    asked: dict[str, object] = {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
    body = {"model": name, **asked, "max_tokens": 64, "temperature": 0.3}
    path = "chat/completions" if chats else "completions"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
