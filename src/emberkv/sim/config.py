"""The set-up of a simulation: every setting of its YAML file, validated with unknown keys refused; and its workload,
which is opened as often as it is needed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from emberkv.cluster.routing import DEFAULT_ROUTING, ROUTER_NAMES
from emberkv.core.policies.eviction import POLICY_NAMES
from emberkv.errors import ConfigError, UnsupportedModelError, WorkloadError
from emberkv.sim.model_spec import load_spec
from emberkv.validation import Strict, describe
from emberkv.workload import bounds, ember_trace
from emberkv.workload.request import Request
from emberkv.workload.source import ClosedLoopTraceSource, GeneratedSource, Source, TraceSource, is_description
from emberkv.workload.spec import GeneratedWorkload
from emberkv.workload.trace import TraceFormat, clip, detect_format, read_trace, scale_rate
from emberkv.yaml_files import read_yaml


def _one_of(names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name!r} is unknown; accepted: {', '.join(names)}")
        return name

    return AfterValidator(check)


def _bytes(given: object) -> object:
    return int(TypeAdapter(ByteSize).validate_python(given)) if isinstance(given, str) else given


Bytes = Annotated[PositiveInt, BeforeValidator(_bytes)]
"""A number, or text such as 64GiB."""

Eviction = Annotated[str, _one_of(POLICY_NAMES)]
Routing = Annotated[str, _one_of(ROUTER_NAMES)]


class Rates(Strict):
    """A machine described by three times in seconds, in place of a model and its hardware.

    >>> rates = Rates(per_step=0.01, per_prefill_token=1e-4, per_decode_token=1e-3)
    >>> rates.kv_bytes_per_token
    131072
    """

    per_step: bounds.Seconds = 0.0
    per_prefill_token: bounds.Seconds
    per_decode_token: bounds.Seconds
    kv_bytes_per_token: Annotated[int, Field(ge=1, le=2**40)] = 131_072


class ModelledTierConfig(Strict):
    """A lower tier of each replica, or one that all replicas share.

    Rates that are not given are the hardware profile's for a tier of this name. keeps: whether its content outlives a
    replica that is lost; that of a shared tier always does.

    >>> ram = ModelledTierConfig(name="ram", capacity="64GiB")
    >>> ram.capacity // 2**30, ram.eviction
    (64, 'lru')
    """

    name: Annotated[str, Field(min_length=1)]
    capacity: Bytes
    read_gb_per_s: PositiveFloat | None = None
    write_gb_per_s: PositiveFloat | None = None
    latency_us: NonNegativeFloat | None = None
    eviction: Eviction = "lru"
    keeps: bool = False
    shared: bool = False


class OutageConfig(Strict):
    """A replica is lost ``at`` seconds, with all its state, and is back ``down_for`` seconds later; None: never.

    >>> outage = OutageConfig(replica=1, at=30.0, down_for=5.0)
    >>> outage.at + outage.down_for
    35.0
    """

    replica: NonNegativeInt
    at: bounds.Seconds
    down_for: bounds.Seconds | None = None


MeanTime = Annotated[float, Field(ge=1e-3, le=bounds.MOST_SECONDS)]


class RandomOutagesConfig(Strict):
    """Each replica is lost and comes back again and again, after exponentially distributed times in seconds.

    >>> outages = RandomOutagesConfig(mean_time_up=3600.0, mean_time_down=60.0)
    >>> SimulationConfig(replicas=4, random_outages=outages).max_retries
    3
    """

    mean_time_up: MeanTime
    mean_time_down: MeanTime


class Targets(Strict):
    """Service levels in milliseconds; a request attains them when it keeps all that are given.

    >>> slo = Targets(ttft_ms=500)
    >>> slo.model_dump(exclude_none=True)
    {'ttft_ms': 500.0}
    """

    ttft_ms: PositiveFloat | None = None
    tpot_ms: PositiveFloat | None = None
    e2e_ms: PositiveFloat | None = None


class SimulationConfig(Strict):
    """A set-up.

    tensor_parallel: devices of a replica; expert_parallel, data_parallel_attention, peer_access: how they share the
    model, see `emberkv.sim.roofline.Layout`.
    model, hardware: names or files; weights, kv: number types other than the model's. rates: in place of both.
    gateways: how many route requests, which come to them in turn.
    kv_blocks: of each replica; None: what its memory holds beside weights, activations and the runtime. memory: bytes
    of each device, if not the profile's. block_size: tokens; None: the trace's own, or 16. hit_unit: hits are rounded
    down to so many tokens, in whole blocks; None: a block; 1: not at all, so that they go on into the partial block
    that a conversation left, as with the kernels of emberkv's server. prefill_chunk is rounded up to whole units;
    max_step_tokens: the budget of a step; max_running: sequences admitted at a time.
    separate_long_prompts: prompts that take more than one step do not hold up a client's shorter ones, as in emberkv's
    server; False: first come, first served, as in other engines.
    prefix_caching: False computes every prompt anew. salted: clients are tenants: they share no block, and replicas
    share their steps between them. tenant_weights: by client, the parts in which they do, which makes them tenants even
    where they share blocks; 1 for a client that is not among them.
    together: whether steps that change nothing but lengths are taken together, which is faster and changes no result.
    warm_up: requests that arrive in the first so many seconds are in no result. stop_at: seconds; requests in flight
    then are unfinished. seed: of random routing and outages. cache_only: no time; each request is admitted whole, at
    once.

    >>> config = SimulationConfig(model="qwen2.5-7b", hardware="h100", replicas=4)
    >>> config.routing, with_changes(config, {"replicas": 8}).replicas
    ('expected-ttft', 8)
    """

    model: str = "llama-3.1-8b"
    hardware: str = "h100"
    weights: str | None = None
    kv: str | None = None
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    expert_parallel: bool = False
    data_parallel_attention: bool = False
    peer_access: bool | None = None
    rates: Rates | None = None
    replicas: Annotated[int, Field(ge=1, le=bounds.MOST_REPLICAS)] = 1
    routing: Routing = DEFAULT_ROUTING
    gateways: Annotated[int, Field(ge=1, le=64)] = 1
    kv_blocks: Annotated[int, Field(ge=1, le=bounds.MOST_BLOCKS)] | None = None
    memory: Bytes | None = None
    block_size: bounds.SomeTokens | None = None
    hit_unit: bounds.SomeTokens | None = None
    eviction: Eviction = "lru"
    prefix_caching: bool = True
    salted: bool = False
    tenant_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    prefill_chunk: bounds.SomeTokens = 2048
    max_step_tokens: bounds.SomeTokens = 2048
    max_running: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    separate_long_prompts: bool = True
    tiers: list[ModelledTierConfig] = Field(default_factory=list)
    outages: list[OutageConfig] = Field(default_factory=list)
    random_outages: RandomOutagesConfig | None = None
    max_retries: Annotated[int, Field(ge=0, le=1_000_000)] = 3
    slo: Targets = Targets()
    warm_up: bounds.Seconds = 0.0
    stop_at: bounds.SomeSeconds | None = None
    seed: int = 0
    cache_only: bool = False
    together: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for outage in self.outages:
            if outage.replica >= self.replicas:
                raise ValueError(f"an outage of replica {outage.replica}; there are 0 to {self.replicas - 1}")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names) or "pool" in names:
            raise ValueError(f"tiers are named {', '.join(names)}; each needs a name of its own, other than pool")
        blocks = (self.kv_blocks or 0) * self.replicas
        if blocks > bounds.MOST_BLOCKS:
            raise ValueError(f"{blocks:,} KV blocks over all replicas; at most {bounds.MOST_BLOCKS:,} can be simulated")
        if self.rates is not None and self.kv_blocks is None:
            raise ValueError("with rates, kv_blocks must be given: there is no model to subtract from a memory")
        if self.cache_only and (self.tiers or self.outages or self.random_outages):
            raise ValueError("cache_only knows no time, and so no tiers and no outages")
        if self.cache_only and self.gateways > 1:
            raise ValueError("cache_only knows one gateway; leave gateways out")
        return self


class TraceConfig(Strict):
    """A recorded workload. A relative path starts at the file's folder.

    block_size: of a Mooncake trace whose lines do not say it. start, stop: clip, in recorded seconds; rate: multiplies
    the requests a second, after that. closed_loop: a follow-up waits for the turn before, where the trace records
    which request it followed.

    >>> trace = TraceConfig(path="trace.jsonl", start=60.0, stop=120.0, rate=2.0)
    >>> trace.closed_loop, trace.trace_format
    (False, None)
    """

    path: str
    format: Literal["emberkv", "mooncake", "azure"] | None = None
    block_size: bounds.SomeTokens | None = None
    rate: bounds.Rate = 1.0
    start: bounds.Seconds = 0.0
    stop: bounds.SomeSeconds | None = None
    closed_loop: bool = False

    @property
    def trace_format(self) -> TraceFormat | None:
        return None if self.format is None else TraceFormat(self.format)


class SetUp(Strict):
    """A whole file: a workload, generated or recorded, and the simulation of it.

    >>> set_up = parse_set_up({"trace": {"path": "a.jsonl"}, "simulation": {"replicas": 2}}, folder=Path())
    >>> set_up.simulation.replicas, set_up.workload
    (2, None)
    """

    workload: GeneratedWorkload | None = None
    trace: TraceConfig | None = None
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        if self.workload is not None and self.trace is not None:
            raise ValueError("has both workload and trace; one of them is accepted")
        return self


def load_set_up(path: Path) -> SetUp:
    """A YAML file. Raises ConfigError naming the file and each key at fault, and WorkloadError if it cannot be read."""
    data = read_yaml(path, ConfigError, WorkloadError)
    try:
        return parse_set_up(data, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_set_up(data: object, folder: Path) -> SetUp:
    """What a YAML file would hold. folder: where relative paths start. Raises ConfigError naming each key at fault."""
    if not isinstance(data, Mapping):
        raise ConfigError("expected a mapping with workload or trace, and simulation")
    try:
        return SetUp.model_validate(dict(data), context={"folder": folder})
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def with_changes(config: SimulationConfig, changes: Mapping[str, Any]) -> SimulationConfig:
    """The same with other values; those of None do not count. Raises ConfigError naming each at fault."""
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return SimulationConfig.model_validate({**config.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


DEFAULT_BLOCK_SIZE = 16


WorkloadSource = str | os.PathLike[str] | Mapping[str, Any]
"""A trace's file, a YAML file, or what such a YAML file holds: ``workload`` or ``trace``, and ``simulation``."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Where the requests of a simulation come from: a generated workload or a trace; exactly one of the two is given.

    folder: where a trace's relative path starts. served: the model that a recording names; empty where it names none.

    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 2, "think_time": 5}
    >>> data = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> config, workload = opened({"workload": data}, {"replicas": 2})
    >>> config.replicas, workload.source().next_arrival().prompt_tokens
    (2, 40)
    """

    generated: GeneratedWorkload | None
    trace: TraceConfig | None
    folder: Path
    served: str = ""

    def source(self) -> Source:
        """The same requests each time. Raises WorkloadError, for a trace also while it is read."""
        if self.generated is not None:
            return GeneratedSource(self.generated)
        assert self.trace is not None
        requests = self._requests(self.trace)
        return ClosedLoopTraceSource(requests) if self.trace.closed_loop else TraceSource(requests)

    def is_empty(self) -> bool:
        """Whether there is not one request. Raises WorkloadError when the first cannot be read."""
        if self.trace is None:
            return self.source().next_arrival() is None
        return next(self._requests(self.trace), None) is None

    def block_size(self) -> int:
        """The block size, in tokens, in which the first request is described; 16 where there is none."""
        if self.trace is None:
            return DEFAULT_BLOCK_SIZE
        first = next(iter(self._requests(self.trace)), None)
        return DEFAULT_BLOCK_SIZE if first is None or first.block_size is None else first.block_size

    @property
    def identity(self) -> str:
        """Equal for equal workloads."""
        if self.trace is not None:
            path = (self.folder / self.trace.path).resolve()
            return self.trace.model_copy(update={"path": str(path)}).model_dump_json()
        assert self.generated is not None
        return f"{self.folder.resolve()} {self.generated.model_dump_json()}"

    def with_seed(self, seed: int) -> "Workload":
        """The same kind of conversations, drawn with another seed; a trace stays as it was recorded."""
        if self.generated is None:
            return self
        return Workload(self.generated.model_copy(update={"seed": seed}), None, self.folder)

    def _requests(self, trace: TraceConfig) -> Iterator[Request]:
        path = self.folder / trace.path
        found: Iterable[Request] = read_trace(path, format=trace.trace_format, block_size=trace.block_size)
        if trace.start or trace.stop is not None:
            found = clip(found, trace.start, inf if trace.stop is None else trace.stop)
        return iter(found if trace.rate == 1 else scale_rate(found, trace.rate))


def open_set_up(path: Path) -> tuple[SetUp, Workload | None]:
    """A YAML file, whose workload may be missing, or a trace with a set-up of defaults.

    A recording's set-up has the model that served it, where none is chosen and its shape is known here.
    Raises ConfigError or WorkloadError.
    """
    set_up = load_set_up(path) if is_description(path) else SetUp(trace=TraceConfig(path=path.name))
    return with_workload(set_up, path.parent)


def with_workload(set_up: SetUp, folder: Path) -> tuple[SetUp, Workload | None]:
    """The set-up with the model that a recording names, as `open_set_up` has it, and its workload.

    folder: where a trace's relative path starts.
    """
    if set_up.workload is None and set_up.trace is None:
        return set_up, None
    served = "" if set_up.trace is None else _served(folder / set_up.trace.path, set_up.trace)
    if served and "model" not in set_up.simulation.model_fields_set and _is_known(served):
        set_up = set_up.model_copy(update={"simulation": with_changes(set_up.simulation, {"model": served})})
    return set_up, Workload(set_up.workload, set_up.trace, folder, served)


def _served(path: Path, trace: TraceConfig) -> str:
    """The model that a recording names; empty where it names none."""
    format = trace.trace_format or detect_format(path)
    return ember_trace.read_header(path).model if format is TraceFormat.EMBERKV else ""


def _is_known(model: str) -> bool:
    try:
        load_spec(model)
    except (ConfigError, UnsupportedModelError):
        return False
    return True


def required(workload: Workload | None, source: object) -> Workload:
    """Raises WorkloadError, naming the source, where there is none."""
    if workload is None:
        raise WorkloadError(f"{source}: has neither workload nor trace; one of them is needed")
    return workload


def opened(workload: WorkloadSource, settings: Mapping[str, Any]) -> tuple[SimulationConfig, Workload]:
    """The set-up and the requests of a workload. settings: keys of ``simulation``, which take precedence.

    Raises ConfigError or WorkloadError.
    """
    if isinstance(workload, Mapping):
        set_up, requests = with_workload(parse_set_up(workload, Path()), Path())
    else:
        set_up, requests = open_set_up(Path(workload))
    named = "the mapping" if isinstance(workload, Mapping) else workload
    return with_changes(set_up.simulation, settings), required(requests, named)
