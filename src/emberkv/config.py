"""The settings of a server, with their types and defaults; `emberkv.settings` reads them."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.defaults import DEFAULT_BLOCK_SIZE, DEFAULT_PREFILL_CHUNK, DEFAULT_WARMUP_SECONDS, machine_cache_folder

S = TypeVar("S", bound=BaseModel)

_FEWEST_SECRET_CHARACTERS = 16

_MOST_BYTES = 2**60

NOT_SETTINGS = ("warmup_fallback_file",)
"""Fields that `read_settings` fills in, and that no option, ``EMBERKV_*`` variable or file sets."""


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret) < _FEWEST_SECRET_CHARACTERS:
        raise ValueError(f"it must have at least {_FEWEST_SECRET_CHARACTERS} characters, drawn at random")
    return secret


def _possible(size: ByteSize) -> ByteSize:
    if size > _MOST_BYTES:
        raise ValueError("use a size of at most 1EiB")
    return size


def _user_path(given: object) -> object:
    """A path with ``~`` replaced, as a shell does only where it stands first in a word."""
    if not isinstance(given, (str, Path)):
        return given
    text = str(given)
    if not text or "\0" in text:
        raise ValueError("use a path that is not empty and has no NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError("use a path without '~': that user has no home folder") from error


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


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError("use a URL like http://10.0.0.7:8080, without a path")
    try:
        parts.port  # noqa: B018 - raises where it is out of range
    except ValueError as error:
        raise ValueError("use a URL like http://10.0.0.7:8080, with a port up to 65535") from error
    return text.rstrip("/")


def _url_prefix(text: str) -> str:
    if text and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("it must be like /emberkv: begin with a slash and not end with one")
    return text


def _server_url(text: str) -> str:
    parts = urlsplit(text)
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix", "mooncake") or not place:
        raise ValueError(
            "use a URL such as redis://HOST:6379, rediss://HOST:6379 for TLS, unix:///PATH, or mooncake://HOST:50051"
        )
    if parts.password is not None or parts.query:
        raise ValueError(
            "use a URL without a password and without '?'; a password comes from --remote-tier-password-file or "
            "EMBERKV_REMOTE_TIER_PASSWORD"
        )
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError("use a port from 0 to 65535 in the URL") from error
    if parts.scheme == "mooncake" and (not port or parts.username is not None or parts.path.strip("/")):
        raise ValueError("use a host and a port alone for Mooncake's master, such as mooncake://HOST:50051")
    return text


def _shown_in_full(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError("it must hold visible characters, and no control characters")
    return name


def _known_policy(name: str) -> str:
    if name not in POLICY_NAMES:
        raise ValueError(f"use one of {', '.join(POLICY_NAMES)}")
    return name


Size = Annotated[ByteSize, AfterValidator(_possible)]
"""Bytes, given as "4GiB" or as a number."""

UserPath = Annotated[Path, BeforeValidator(_user_path)]
Key = Annotated[SecretStr, AfterValidator(_usable_secret_key)]
NotEmpty = Annotated[str, AfterValidator(_shown_in_full)]
"""An empty model would be the demonstration model, and an empty host all addresses."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _one_source(settings: S, *names: str) -> S:
    """The settings, of which each of ``names`` comes from its option or its file, not from both."""
    for name in names:
        if getattr(settings, name) is not None and getattr(settings, f"{name}_file") is not None:
            option = f"--{name.replace('_', '-')}"
            first = f"EMBERKV_{name.upper()}" if name in ("remote_tier_password", "cluster_secret") else option
            raise ValueError(f"{first} and {option}-file are both given; give one of them")
    return settings


class ModelSettings(_Settings):
    """Which model is served, and what computes it.

    model: a folder or a hub id; None serves the bundled demonstration model.
    served_names: what requests may call the model, beside the model's own name; "*" stands for any characters.
    strict_names: requests with the names that coding agents use for their own vendor's models are refused, too.
    chat_template: the name of one of the model's templates, or a file with one; None: the model's own.
    tool_parser, reasoning_parser: the formats of the model's tool calls and thoughts; "auto": as its chat template
    shows; "none": these stay in the answer's text.
    generation_config: "auto" takes the model's generation_config.json as defaults of sampling; "ignore" does not.
    quantize: "int8" or "int4" rounds the weights of linear layers while a plain checkpoint is loaded.
    kv_dtype: of keys and values; "auto": the activations'; "int8": integers, with a scale for each token and KV head.
    kernels: what computes on a CPU. "native": C++, compiled at the first start, and an error where that fails;
    "torch": torch's own operations; "auto": C++ where it can be.
    machine_cache: a folder for what holds for this machine alone: compiled kernels, and self-checks that were passed.
    self_check: whether the start tries out the model: "auto" unless the same weights have passed it on this machine,
    with the same versions and settings; "always" at each start.
    model_on_demand: the model is loaded when a request first needs it.
    """

    model: NotEmpty | None = None
    served_names: tuple[NotEmpty, ...] = ()
    strict_names: bool = False
    chat_template: NotEmpty | None = None
    tool_parser: NotEmpty = "auto"
    reasoning_parser: NotEmpty = "auto"
    generation_config: Literal["auto", "ignore"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    kv_dtype: Literal["auto", "int8"] = "auto"
    device: str = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    machine_cache: UserPath = Field(default_factory=machine_cache_folder)
    self_check: Literal["auto", "always"] = "auto"
    model_on_demand: bool = False


class CacheSettings(_Settings):
    """The KV pool, what it reuses, and how the engine schedules.

    cache_ram: bytes of the KV pool ("4GiB"); None takes a quarter of the free memory, at most 8 full contexts.
    prefill_chunk: tokens computed per prefill pass; a multiple of block_size.
    max_step_tokens: token budget of a step that decodes and prefills.
    exact: reuse only KV state that is bit-equal to a cold prefill's.
    prefix_cache: False computes every prompt anew.
    canonical: a YAML file of rules that rewrite volatile lines of prompts.
    agent_rules: also drop lines of known agents that mean nothing to the model.
    answer_memory: remember answers, and put them into later prompts as they were sampled.
    next_turn_tokens: how many tokens a minute are computed, while the server is idle, of what the next prompts of
    conversations begin with, where the chat template rewrites earlier turns; 0: none.
    """

    cache_ram: Size | None = Field(default=None, gt=0)
    block_size: int = Field(default=DEFAULT_BLOCK_SIZE, ge=1, le=1024)
    prefill_chunk: int = Field(default=DEFAULT_PREFILL_CHUNK, ge=1, le=2**20)
    max_step_tokens: int = Field(default=256, ge=1, le=2**20)
    max_running: int = Field(default=64, ge=1, le=2**16)
    eviction: Annotated[str, AfterValidator(_known_policy)] = "lru"
    exact: bool = False
    prefix_cache: bool = True
    canonical: UserPath | None = None
    agent_rules: bool = True
    answer_memory: bool = True
    next_turn_tokens: int = Field(default=60_000, ge=0, le=10**9)

    @model_validator(mode="after")
    def _chunk_fits_blocks(self) -> Self:
        if self.prefill_chunk % self.block_size:
            raise ValueError(
                f"--prefill-chunk {self.prefill_chunk}: use a multiple of --block-size, which is {self.block_size}"
            )
        return self


class TierSettings(_Settings):
    """The tiers below the KV pool.

    cache_dir: a folder in which blocks outlive the process, up to ``cache_disk`` bytes of them; it also keeps the
    tenants' secret and learned prompts.
    ram_tier: bytes of host memory for blocks that are evicted from the KV pool; 0: none.
    shm_tier: bytes of host memory that the workers of one machine share; 0: none.
    remote_tier: the URL of a Redis or Valkey server for blocks, which machines share, up to ``remote_tier_bytes`` of
    them; one that is not used for ``remote_tier_ttl`` seconds expires. Its password comes from the environment or a
    file. Or the URL of a Mooncake store's master; ``remote_tier_bytes`` are then what this process gives to the store.
    """

    cache_dir: UserPath | None = None
    cache_disk: Size = Field(default=ByteSize(50 * 2**30), gt=0)
    ram_tier: Size = Field(default=ByteSize(0), ge=0)
    shm_tier: Size = Field(default=ByteSize(0), ge=0)
    remote_tier: Annotated[str, AfterValidator(_server_url)] | None = None
    remote_tier_bytes: Size = Field(default=ByteSize(8 * 2**30), gt=0)
    remote_tier_ttl: float = Field(default=86_400.0, ge=1, le=10**9)
    remote_tier_password: SecretStr | None = None
    remote_tier_password_file: UserPath | None = None

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        return _one_source(self, "remote_tier_password")

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> Self:
        if "cache_disk" in self.model_fields_set and self.cache_dir is None:
            raise ValueError("--cache-disk is given without --cache-dir; give the folder that it limits, too")
        return self

    @model_validator(mode="after")
    def _remote_settings_have_a_server(self) -> Self:
        given = [name for name in self.model_fields_set if name.startswith("remote_tier_") and getattr(self, name)]
        if given and self.remote_tier is None:
            raise ValueError(f"--{min(given).replace('_', '-')} is given without --remote-tier; give its URL, too")
        others = sorted(set(given) - {"remote_tier_bytes"})
        if others and self.remote_tier is not None and self.remote_tier.startswith("mooncake:"):
            option = f"--{others[0].replace('_', '-')}"
            raise ValueError(f"{option} is given with a Mooncake store, which has no such setting; leave it out")
        return self


class ListenSettings(_Settings):
    """Where the server listens, and its limits on connections and requests.

    root_path: the path under which a proxy serves the API.
    tls_cert, tls_key: PEM files of a certificate and its key, for HTTPS.
    cors_origins: web pages from these origins may use the API, "*" being all.
    request_timeout: seconds from a request's arrival to the end of its answer, which is interrupted then; None: no
    limit.
    drain_seconds: how long running answers may go on after a signal to stop.
    max_requests: answers that are made or wait at the same time; more are refused.
    on_overflow: what is done with a ``max_tokens`` that, with the prompt, exceeds the context.
    """

    host: NotEmpty = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    root_path: Annotated[str, AfterValidator(_url_prefix)] = ""
    tls_cert: UserPath | None = None
    tls_key: UserPath | None = None
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    max_body: Size | None = Field(default=None, gt=0)
    max_connections: int = Field(default=1024, ge=1, le=2**16)
    request_timeout: float | None = Field(default=None, gt=0, le=86_400)
    max_requests: int = Field(default=512, ge=1, le=2**16)
    drain_seconds: float = Field(default=10.0, ge=0, le=86_400)
    on_overflow: Literal["clip", "refuse"] = "clip"

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together; give both, or neither for plain HTTP")
        return self


class AccessSettings(_Settings):
    """Which requests are let in, and for which tenant.

    api_keys, api_key_file: API keys, and a file that holds more, one a line; see docs/security.md for a server without
    any.
    tenants: a YAML file of API keys' tenants. secret: keeps tenants' blocks apart, and comes from the environment; else
    a file beside the cached blocks holds one, and without these each start draws a new one.
    admin_key, metrics_key: what the cache's own routes and the metrics require; each can come from its file instead.
    """

    api_keys: tuple[Key, ...] = ()
    api_key_file: UserPath | None = None
    tenants: UserPath | None = None
    secret: Annotated[SecretStr, AfterValidator(_long_enough)] | None = None
    admin_key: Key | None = None
    admin_key_file: UserPath | None = None
    metrics_key: Key | None = None
    metrics_key_file: UserPath | None = None

    @model_validator(mode="after")
    def _one_key_of_a_kind(self) -> Self:
        return _one_source(self, "admin_key", "metrics_key")


class WarmupSettings(_Settings):
    """Prompts that are computed before requests ask for them.

    warmup: False computes none. warmup_timeout: seconds that readiness waits for the warmup, from 1 to 300; another
    number warns and becomes 60.
    warmup_system_files: system prompts to warm, one a file; without any, the one in warmup_fallback_file, which may be
    missing, else the built-in one.
    warmup_requests: files with bodies of requests whose prompts are warmed, too.
    warmup_required: the server is not ready before these are warm, however long that takes.
    """

    warmup: bool = True
    warmup_timeout: float = DEFAULT_WARMUP_SECONDS
    warmup_system_files: tuple[UserPath, ...] = ()
    warmup_fallback_file: UserPath | None = None
    warmup_requests: tuple[UserPath, ...] = ()
    warmup_required: bool = False


class RecordSettings(_Settings):
    """The log, and traces of the requests.

    otlp_endpoint: URL of the collector that gets spans of each request by OTLP over HTTP; None: there are no spans.

    record_trace: a file to write, in emberkv's own trace format: times, lengths and keyed block hashes, no text.
    trace_unit: tokens that have a hash in it, a divisor of block_size; None: as many as a block has.
    """

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    record_trace: UserPath | None = None
    otlp_endpoint: Annotated[str, AfterValidator(_base_url)] | None = None
    trace_unit: int | None = Field(default=None, ge=1)


class ClusterSettings(_Settings):
    """The server as a worker of gateways, and its routes by sequence.

    cluster_secret, cluster_secret_file: what gateways and workers authenticate each other with; with one, the server
    is a worker. worker_id: its name; None: the host and port of worker_url. worker_url: where gateways reach it;
    None: where it listens. gateways: URLs of gateways, at which it registers.
    kv_routes: adds the routes by sequence: /kv, /generate, /inference and /stats.
    kv_max_bytes, kv_max_entries: limits of the KV tensors under /kv, in bytes and in layers of all sequences.
    """

    worker_id: Annotated[NotEmpty, Field(max_length=128)] | None = None
    kv_routes: bool = False
    kv_max_bytes: Size = Field(default=ByteSize(2**30), gt=0)
    kv_max_entries: int = Field(default=50_000, ge=1, le=2**31)
    cluster_secret: Key | None = None
    cluster_secret_file: UserPath | None = None
    worker_url: Annotated[str, AfterValidator(_base_url)] | None = None
    gateways: tuple[Annotated[str, AfterValidator(_base_url)], ...] = ()

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        return _one_source(self, "cluster_secret")

    @model_validator(mode="after")
    def _gateways_have_a_secret(self) -> Self:
        if self.gateways and self.cluster_secret is None and self.cluster_secret_file is None:
            raise ValueError("--gateway is given without --cluster-secret-file; give the secret that the gateway has")
        return self


class ServeConfig(
    ClusterSettings,
    RecordSettings,
    WarmupSettings,
    AccessSettings,
    ListenSettings,
    TierSettings,
    CacheSettings,
    ModelSettings,
):
    """The settings of ``emberkv serve``: all groups as one, because each option, variable and key of a file is a field.

    What needs one group takes that group as its type.
    """

    @model_validator(mode="after")
    def _trace_unit_fits_blocks(self) -> Self:
        if self.trace_unit is not None and self.block_size % self.trace_unit:
            raise ValueError(
                f"--trace-unit {self.trace_unit}: use a divisor of --block-size, which is {self.block_size}"
            )
        if self.trace_unit is not None and self.record_trace is None:
            raise ValueError("--trace-unit is given without --record-trace; name the file to write, too")
        return self
