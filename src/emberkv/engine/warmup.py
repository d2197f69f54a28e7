"""Warming a cache from Python: the KV blocks of the standard system prompt, computed from a model in memory.

Nothing heavy is imported before it is needed: importing the package must stay cheap.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from emberkv.engine.system_prompt import get_standard_system_prompt

_log = logging.getLogger(__name__)


class BlockStore(Protocol):
    """Where warmed blocks go; `emberkv.InMemoryKVCacheManager` is one."""

    def set(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None: ...


async def warmup_kv_cache(
    model: Any,
    tokenizer: Any,
    cache_manager: BlockStore | None = None,
    timeout_sec: float = 60.0,
    enabled: bool = True,
    *,
    system_prompt: str | None = None,
) -> bool:
    """Compute the KV state of ``system_prompt`` and store it in ``cache_manager``, block by block.

    model: a transformers causal language model, which is left as it is; meanwhile its weights are there a second
    time on a CPU. tokenizer: its fast tokenizer. cache_manager: without one there is nowhere to store, so the answer
    is False. system_prompt: the standard one by default. What is stored is the part that all chat requests with this
    prompt begin with, rendered by the tokenizer's chat template.

    Keys are the hexadecimal block identities of a server with default settings that serves the same weights; values
    are the records of its cache tiers, with the same bytes; ``prefix_tokens`` counts the tokens up to and with a block.

    Computes in a thread. The timeout, in seconds, is looked at before each step of the preparation and each prefill
    chunk; whatever was stored until then, also when the caller is cancelled, stays.

    Returns True when every block is stored. False, without an exception, when not ``enabled``, out of time, or
    something is missing or fails; the log says what.
    """
    if not enabled:
        return False
    given = {"model": model, "tokenizer": tokenizer, "cache_manager": cache_manager}
    if missing := [name for name, value in given.items() if value is None]:
        _log.warning("nothing is warmed: %s missing", " and ".join(missing) + (" is" if len(missing) == 1 else " are"))
        return False
    given_up = threading.Event()
    deadline = time.monotonic() + timeout_sec

    def in_time() -> bool:
        return time.monotonic() < deadline and not given_up.is_set()

    prompt = system_prompt if system_prompt is not None else get_standard_system_prompt()
    try:
        done = await asyncio.to_thread(_store_blocks, model, tokenizer, prompt, cache_manager, in_time)
    except Exception as error:  # noqa: BLE001 - a cold cache is slow, never wrong: callers go on without
        _log.warning("warming the cache failed: %s: %s", type(error).__name__, error)
        return False
    finally:
        given_up.set()
    if not done:
        _log.warning("the cache is not warmed in %s s; what was done stays", timeout_sec)
    return done


def _store_blocks(model: Any, tokenizer: Any, prompt: str, store: Any, in_time: Callable[[], bool]) -> bool:
    from emberkv.engine.warm_blocks import store_prefix  # noqa: PLC0415 - brings torch with it

    return store_prefix(model, tokenizer, prompt, store, in_time=in_time)
