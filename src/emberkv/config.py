"""Settings, read once at the edge: defaults, then ``EMBERKV_*`` variables, then what the command line gives."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import ConfigError

ENV_PREFIX = "EMBERKV_"
DEFAULT_PREFILL_CHUNK = 128
"""The smallest chunk that reached 90% of the best prefill rate where it was measured; see docs/benchmarks.md."""


DEFAULT_WARMUP_SECONDS = 60.0
_WARMUP_SECONDS = (1.0, 300.0)

_LISTS = ("api_keys", "cors_origins", "warmup_system_files")
_HIDDEN = ("secret", "api_keys", "admin_key", "metrics_key")
"""What these hold must not be repeated in an error."""

_FEWEST_SECRET_CHARACTERS = 16

_NOT_SETTINGS = ("warmup_fallback_file",)
"""Fields that `serve_config` fills in, and that no option or ``EMBERKV_*`` variable sets."""

_log = logging.getLogger(__name__)


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret) < _FEWEST_SECRET_CHARACTERS:
        raise ValueError(f"it must have at least {_FEWEST_SECRET_CHARACTERS} characters, drawn at random")
    return secret


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("it must be a finite number of seconds")
    return number


def usable_key(key: str) -> str:
    """The key as it is. Raises ValueError for one that no client could send, which would lock all out, or none."""
    if not key:
        raise ValueError("the key is empty; give a key of some length, drawn at random, or leave it out")
    if key != key.strip() or not key.isprintable():
        raise ValueError("the key begins or ends with a blank, or has a character that no header can carry")
    return key


def _usable_secret_key(key: SecretStr) -> SecretStr:
    usable_key(key.get_secret_value())
    return key


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != text):
        raise ValueError("an origin is like https://example.com or http://localhost:3000, without a path; '*' is all")
    return text


def _url_prefix(text: str) -> str:
    if text and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("it must be like /emberkv: begin with a slash and not end with one")
    return text


def _shown_in_full(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("it must hold visible characters, and no control characters")
    return name


def _known_policy(name: str) -> str:
    if name not in POLICY_NAMES:
        raise ValueError(f"use one of {', '.join(POLICY_NAMES)}")
    return name


Key = Annotated[SecretStr, AfterValidator(_usable_secret_key)]
NotEmpty = Annotated[str, AfterValidator(_shown_in_full)]
"""An empty model would be the demonstration model, and an empty host all addresses."""


class ServeConfig(BaseModel):
    """What ``emberkv serve`` needs to know.

    model: a folder or a hub id; None serves the bundled demonstration model.
    cache_ram: bytes of the KV pool ("4GiB"); None takes a quarter of the free memory.
    prefill_chunk: tokens computed per prefill pass; a multiple of block_size.
    max_step_tokens: token budget of a step that decodes and prefills.
    exact: reuse only KV state that is bit-equal to a cold prefill's.
    kernels: what computes on a CPU. "native": C++, compiled at the first start, and an error where that fails;
    "torch": torch's own operations; "auto": C++ where it can be.
    prefix_cache: False computes every prompt anew.
    cache_dir: a folder in which blocks outlive the process, up to ``cache_disk`` bytes of them, with what else is kept.
    ram_tier: bytes of host memory for blocks that the KV pool has no room for; 0: none.
    tenants: a YAML file of API keys' tenants. secret: keeps tenants' blocks apart, and comes from the environment; else
    a file beside the cached blocks holds one, and without these each start draws a new one.
    drain_seconds: how long running answers may go on after a signal to stop.
    api_keys, api_key_file: keys given themselves, and a file that holds more, one a line; docs/security.md says what a
    server without any is open to. admin_key, metrics_key: what the cache's own routes and the metrics ask for; each
    can come from its file instead.
    canonical: a YAML file of rules that rewrite volatile lines of prompts.
    record_trace: a file to write, in emberkv's own trace format: times, lengths and keyed identities, no text.
    trace_unit: tokens that have an identity in it, a divisor of block_size; None: as many as a block has.
    warmup: False computes no prompt before the first request asks for it.
    warmup_timeout: seconds that readiness waits for the warmup, from 1 to 300; another number warns and becomes 60.
    warmup_system_files: system prompts to warm, one a file; without any, the one in warmup_fallback_file, which may be
    missing, else the built-in one.
    warmup_required: the server is not ready before these are warm, however long that takes.
    cors_origins: web pages from these origins may use the API, "*" being all.
    root_path: the path under which a proxy serves the API.
    tls_cert, tls_key: PEM files of a certificate and its key, for HTTPS.
    machine_cache: a folder for the compiled kernels, which only this machine's processor can use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: NotEmpty | None = None
    served_name: NotEmpty | None = None
    host: NotEmpty = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    cache_ram: ByteSize | None = Field(default=None, gt=0)
    block_size: int = Field(default=16, ge=1, le=1024)
    prefill_chunk: int = Field(default=DEFAULT_PREFILL_CHUNK, ge=1)
    max_step_tokens: int = Field(default=256, ge=1)
    max_running: int = Field(default=64, ge=1)
    eviction: Annotated[str, AfterValidator(_known_policy)] = "lru"
    exact: bool = False
    prefix_cache: bool = True
    api_keys: tuple[Key, ...] = ()
    api_key_file: Path | None = None
    cache_dir: Path | None = None
    cache_disk: ByteSize = Field(default=ByteSize(50 * 2**30), gt=0)
    ram_tier: ByteSize = Field(default=ByteSize(0), ge=0)
    tenants: Path | None = None
    secret: Annotated[SecretStr, AfterValidator(_long_enough)] | None = None
    max_body: ByteSize = Field(default=ByteSize(16 * 2**20), gt=0)
    max_connections: int = Field(default=1024, ge=1)
    drain_seconds: Annotated[float, AfterValidator(_finite)] = Field(default=10.0, ge=0)
    admin_key: Key | None = None
    admin_key_file: Path | None = None
    metrics_key: Key | None = None
    metrics_key_file: Path | None = None
    canonical: Path | None = None
    record_trace: Path | None = None
    trace_unit: int | None = Field(default=None, ge=1)
    warmup: bool = True
    warmup_timeout: Annotated[float, AfterValidator(_finite)] = DEFAULT_WARMUP_SECONDS
    warmup_system_files: tuple[Path, ...] = ()
    warmup_fallback_file: Path | None = None
    warmup_required: bool = False
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    root_path: Annotated[str, AfterValidator(_url_prefix)] = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    machine_cache: Path = Path("~/.cache/emberkv").expanduser()

    @model_validator(mode="after")
    def _chunk_fits_blocks(self) -> Self:
        if self.prefill_chunk % self.block_size:
            raise ValueError(
                f"prefill_chunk is {self.prefill_chunk}; it must be a multiple of block_size, {self.block_size}"
            )
        return self

    @model_validator(mode="after")
    def _trace_unit_fits_blocks(self) -> Self:
        if self.trace_unit is not None and self.block_size % self.trace_unit:
            raise ValueError(f"trace_unit is {self.trace_unit}; it must divide block_size, {self.block_size}")
        if self.trace_unit is not None and self.record_trace is None:
            raise ValueError("trace_unit is given without record_trace; name the file to write, too")
        return self

    @model_validator(mode="after")
    def _one_key_of_a_kind(self) -> Self:
        for name in ("admin_key", "metrics_key"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name} and {name}_file are both given; give one of them")
        return self

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both, or neither for plain HTTP")
        return self

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> Self:
        if "cache_disk" in self.model_fields_set and self.cache_dir is None:
            raise ValueError("cache_disk is given without cache_dir; give the folder that it is the limit of, too")
        return self


@dataclass(frozen=True, slots=True)
class WarmupVariables:
    """What three variables say that other servers of this kind have, too; None where one is empty or of no use.

    enabled: ``KV_CACHE_WARMUP``. timeout: ``WARMUP_TIMEOUT_SEC``, from 1 to 300 seconds. system_file:
    ``WARMUP_SYSTEM_FILE``.
    """

    enabled: bool | None = None
    timeout: float | None = None
    system_file: Path | None = None


def warmup_variables(environ: Mapping[str, str]) -> WarmupVariables:
    """Read the three variables. A bad value is ignored with a warning: a server is to start whatever they hold."""
    enabled = timeout = None
    if switch := environ.get("KV_CACHE_WARMUP", "").strip():
        try:
            enabled = TypeAdapter(bool).validate_python(switch)
        except ValidationError:
            _log.warning("KV_CACHE_WARMUP is %r; it must be 0 or 1, so it is ignored", switch)
    if seconds := environ.get("WARMUP_TIMEOUT_SEC", "").strip():
        timeout = _warmup_seconds("WARMUP_TIMEOUT_SEC", seconds)
    file = environ.get("WARMUP_SYSTEM_FILE", "")
    return WarmupVariables(enabled, timeout, Path(file).expanduser() if file else None)


def _warmup_seconds(name: str, given: str | float) -> float:
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


def serve_config(given: Mapping[str, Any], environ: Mapping[str, str]) -> ServeConfig:
    """Merge ``EMBERKV_*`` variables with what was ``given`` (entries of None count as not given).

    ``EMBERKV_API_KEYS`` and ``EMBERKV_WARMUP_SYSTEM_FILES`` hold entries separated by commas. Where nothing else is
    given, those of `WarmupVariables` count. Raises ConfigError naming each variable or setting at fault.
    """
    values: dict[str, Any] = {}
    unknown, empty = [], []
    known = [name for name in ServeConfig.model_fields if name not in _NOT_SETTINGS]
    for variable, text in environ.items():
        if variable.startswith(ENV_PREFIX):
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in known:
                unknown.append(variable)
            values[name] = [each.strip() for each in text.split(",") if each.strip()] if name in _LISTS else text
            if not values[name]:
                empty.append(variable)
    if empty:  # a secret that did not reach the server must not open it
        raise ConfigError(f"{', '.join(sorted(empty))} is set to nothing; give a value, or do not set it")
    if unknown:
        names = ", ".join(f"{ENV_PREFIX}{name.upper()}" for name in known)
        raise ConfigError(f"unknown variable {', '.join(sorted(unknown))}; known are {names}")
    values.update({name: value for name, value in given.items() if value is not None})
    variables = warmup_variables(environ)
    others = {
        "warmup": variables.enabled,
        "warmup_timeout": variables.timeout,
        "warmup_fallback_file": variables.system_file,
    }
    values = {**{name: value for name, value in others.items() if value is not None}, **values}
    try:
        config = ServeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_complaint(detail) for detail in error.errors())) from error
    return config.model_copy(update={"warmup_timeout": _warmup_seconds("--warmup-timeout", config.warmup_timeout)})


def _complaint(detail: Any) -> str:
    name = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if name.startswith(_HIDDEN):
        return f"{name}: {message}"
    return f"{name} is {detail['input']!r}: {message}" if name else message
