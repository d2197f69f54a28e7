"""Defaults and environment variables that a server and an engine without one have in common."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

_log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
"""Tokens in a block of the KV cache."""

DEFAULT_PREFILL_CHUNK = 128
"""The smallest chunk that reached 90% of the best prefill rate where it was measured; see docs/benchmarks.md."""

DEFAULT_WARMUP_SECONDS = 60.0
_WARMUP_SECONDS = (1.0, 300.0)


def machine_cache_folder() -> Path:
    """The user's folder for compiled kernels, which only this machine's processor can use."""
    return Path("~/.cache/emberkv").expanduser()


def state_folder() -> Path:
    """The user's folder for what emberkv remembers of the clusters that it has started."""
    return Path("~/.local/state/emberkv").expanduser()


@dataclass(frozen=True, slots=True)
class WarmupVariables:
    """Three variables of the warmup that other servers read as well; None where one is empty or unusable.

    enabled: ``KV_CACHE_WARMUP``. timeout: ``WARMUP_TIMEOUT_SEC``, from 1 to 300 seconds. system_file:
    ``WARMUP_SYSTEM_FILE``.
    """

    enabled: bool | None = None
    timeout: float | None = None
    system_file: Path | None = None


def warmup_variables(environ: Mapping[str, str]) -> WarmupVariables:
    """Read the three variables. A bad value is ignored with a warning, so that the server starts whatever they hold."""
    enabled = timeout = None
    if switch := environ.get("KV_CACHE_WARMUP", "").strip():
        try:
            enabled = TypeAdapter(bool).validate_python(switch)
        except ValidationError:
            _log.warning("KV_CACHE_WARMUP is %r; it must be 0 or 1, so it is ignored", switch)
    if seconds := environ.get("WARMUP_TIMEOUT_SEC", "").strip():
        timeout = usable_warmup_seconds("WARMUP_TIMEOUT_SEC", seconds)
    file = environ.get("WARMUP_SYSTEM_FILE", "")
    return WarmupVariables(enabled, timeout, Path(file).expanduser() if file else None)


def usable_warmup_seconds(name: str, given: str | float) -> float:
    """A usable deadline, with a warning where it is not the one given."""
    least, most = _WARMUP_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if least <= seconds <= most:
        return seconds
    default = DEFAULT_WARMUP_SECONDS
    _log.warning("%s is %s; it must be from %g to %g seconds, so %g is used", name, given, least, most, default)
    return default
