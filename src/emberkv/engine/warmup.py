"""Warming a cache from Python: the KV blocks of the standard system prompt, computed from a model in memory.

Nothing heavy is imported before it is needed: importing the package must stay cheap.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from emberkv.defaults import DEFAULT_WARMUP_SECONDS, warmup_variables
from emberkv.errors import ConfigError

MAX_PROMPT_BYTES = 2**20

BUILT_IN_PROMPT = """\
You are a helpful, careful assistant. Answer the question that was asked, in the language in which it was asked, and \
begin with the answer itself. Keep it as short as the subject allows; when steps are needed, give them in order and \
say what each one is for. If something is unclear, say how you understand it and go on; ask back only when the \
possible meanings lead to different answers. Separate what you know from what you suppose, and say so when you do not \
know. Never invent quotations, figures, names or sources. Show code in fenced blocks, complete enough to run, and \
mention the versions it needs. Check calculations before you give them. When a request could harm somebody, explain \
what you cannot help with and offer what you can. Treat whatever people share with you as confidential."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


def get_standard_system_prompt(warmup_file: str | Path | None = None) -> str:
    """What ``warmup_file`` holds, to the letter, else the built-in assistant prompt.

    Without an argument, the variable ``WARMUP_SYSTEM_FILE`` names the file. The built-in prompt is also the answer,
    with a warning, when the file is missing, cannot be read, is empty, larger than 1 MiB, or not UTF-8.
    """
    return prompt_or_built_in(Path(warmup_file) if warmup_file else warmup_variables(os.environ).system_file)


def prompt_or_built_in(path: Path | None) -> str:
    """As `get_standard_system_prompt`; None is the built-in prompt, whatever the environment holds."""
    if path is None:
        return BUILT_IN_PROMPT
    try:
        return read_system_prompt(path)
    except ConfigError as error:
        _log.warning("the system prompt file %s; the built-in prompt takes its place", error)
        return BUILT_IN_PROMPT


def read_system_prompt(path: Path) -> str:
    """What a file holds, to the letter but for a byte-order mark.

    Raises ConfigError, beginning with the file's name, where it cannot be read, is larger than 1 MiB, is not UTF-8 or
    is empty.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from error
    if len(content) > MAX_PROMPT_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_PROMPT_BYTES:,} bytes")
    if not text.strip():
        raise ConfigError(f"{path} is empty")
    return text


class BlockStore(Protocol):
    """Where warmed blocks go; `emberkv.InMemoryKVCacheManager` is one."""

    def set(self, key: str, value: bytes, prefix_tokens: int | None = None) -> None: ...


async def warmup_kv_cache(
    model: Any,
    tokenizer: Any,
    cache_manager: BlockStore | None = None,
    timeout_sec: float | None = None,
    enabled: bool | None = None,
    *,
    system_prompt: str | None = None,
) -> bool:
    """Compute the KV state of ``system_prompt`` and store it in ``cache_manager``, block by block.

    model: a transformers causal language model, which is left as it is; meanwhile its weights are there a second
    time on a CPU. tokenizer: its fast tokenizer. cache_manager: without one there is nowhere to store, so the answer
    is False. What is stored is the part that all chat requests with this prompt begin with, rendered by the
    tokenizer's chat template.

    Arguments that are not given are read from the environment: timeout_sec, in seconds, from ``WARMUP_TIMEOUT_SEC``,
    else 60; enabled from ``KV_CACHE_WARMUP``, else True; system_prompt from the file that ``WARMUP_SYSTEM_FILE`` names,
    else the built-in prompt. A variable of no use is ignored with a warning.

    Keys are the hexadecimal block hashes of a server with default settings that serves the same weights; values
    are the records of its cache tiers, with the same bytes; ``prefix_tokens`` counts the tokens up to and with a block.

    Computes in a thread of its own. When the time is up or the caller is cancelled, this returns at once. The thread
    ends after the step that it is in, which may be a compilation, and stores no further block; the process waits for it
    at its exit. What was stored until then stays: it is whole, and a prefix of the prompt.

    Returns True when every full block is stored. False, without an exception, when not enabled, out of time, or
    something is missing or fails, a prompt shorter than a block among it; the log says what.
    """
    variables = warmup_variables(os.environ)
    if not _first(enabled, variables.enabled, True):
        return False
    seconds = _first(timeout_sec, variables.timeout, DEFAULT_WARMUP_SECONDS)
    if _lacks_any(model=model, tokenizer=tokenizer, cache_manager=cache_manager):
        return False
    prompt = system_prompt if system_prompt is not None else prompt_or_built_in(variables.system_file)
    given_up = threading.Event()
    done = False
    try:
        if seconds > 0:
            work = _started(lambda: _store_blocks(model, tokenizer, prompt, cache_manager, given_up))
            done = await asyncio.wait_for(work, seconds)
    except TimeoutError:
        pass  # it says so below
    except Exception as error:  # noqa: BLE001 - a cold cache is slow, never wrong: callers go on without
        _log.warning("warming the cache failed: %s: %s", type(error).__name__, error)
        return False
    finally:
        given_up.set()
    if not done:
        _log.warning("the cache is not warmed in %g s; what was done stays", seconds)
    return done


def _lacks_any(**given: Any) -> bool:
    """Whether any of these is None, which is warned of."""
    missing = [name for name, value in given.items() if value is None]
    if missing:
        _log.warning("nothing is warmed: %s missing", " and ".join(missing) + (" is" if len(missing) == 1 else " are"))
    return bool(missing)


def _first(given: T | None, variable: T | None, default: T) -> T:
    if given is not None:
        return given
    return variable if variable is not None else default


def _started(work: Callable[[], bool]) -> "asyncio.Future[bool]":
    """What ``work`` comes to on a thread of its own: one of asyncio's would be waited for when the loop is closed."""
    outcome: Future[bool] = Future()
    outcome.set_running_or_notify_cancel()  # from now on, a caller that stops waiting does not cancel it

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried over to the caller, if it still waits
            outcome.set_exception(error)

    threading.Thread(target=run, name="emberkv-warmup").start()
    return asyncio.wrap_future(outcome)


def _store_blocks(model: Any, tokenizer: Any, prompt: str, store: Any, given_up: threading.Event) -> bool:
    from emberkv.engine.torch.warm_blocks import store_prefix  # noqa: PLC0415 - brings torch with it

    return store_prefix(model, tokenizer, prompt, store.set, in_time=lambda: not given_up.is_set())
