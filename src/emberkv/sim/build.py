"""Builds replicas, router and clock from a configuration, ready for the requests of a source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any

from emberkv import __version__
from emberkv.cluster.block_index import BlockIndex
from emberkv.cluster.routing import Recorder, Router, make_router, names
from emberkv.core.block_pool import BlockCost, BlockPool, uniform_cost
from emberkv.core.events import EventLog
from emberkv.core.hashing import BlockHash, root_hash, salted
from emberkv.core.policies.eviction import EntryCost, make_policy
from emberkv.core.prefix_cache import PrefixCache
from emberkv.core.scheduler import Scheduler, SchedulerConfig
from emberkv.errors import ConfigError
from emberkv.sim.config import ModelledTierConfig, SimulationConfig
from emberkv.sim.formatting import format_count, format_size
from emberkv.sim.hardware import GB, GIB, MICROSECOND, HardwareProfile, load_profile
from emberkv.sim.model_spec import ModelSpec, load_spec
from emberkv.sim.outcome import RequestOutcome
from emberkv.sim.replica import Replica
from emberkv.sim.roofline import Layout, Roofline
from emberkv.sim.simulator import Outage, Progress, RandomOutages, RootOf, Simulator, outages
from emberkv.sim.tiers import Channel, ModelledTier, ModelledTiers
from emberkv.sim.timing import ConstantRates, StepClock, StepTimer
from emberkv.workload.bounds import MOST_BLOCKS
from emberkv.workload.source import Source

UTILISATION = 0.9
"""Share of a device's memory that a server takes by default, as vLLM does."""

SAMPLED_BYTES = 12
"""Bytes of a logit while it is sampled from: fp32 logits, a copy and the probabilities."""


def weight_bytes(model: ModelSpec, tensor_parallel: int = 1, *, whole_attention: bool = False) -> int:
    """Bytes of weights on each device of a group. whole_attention: each has all of the attention's, if it is
    data-parallel.
    """
    if not whole_attention:
        return -(-model.weight_bytes // tensor_parallel)
    attention = round(model.layers * model.attention_parameters * model.linear_bits / 8)
    return attention + -(-(model.weight_bytes - attention) // tensor_parallel)


def activation_bytes(model: ModelSpec, step_tokens: int, sequences: int, tensor_parallel: int = 1) -> int:
    """Bytes that a step of ``step_tokens`` needs at its peak on each device, ``sequences`` of them sampling.

    The widest moment of a layer: its input, the residual and the normed copy, and the MLP's two halves and their
    product; besides, the logits that are sampled from.
    """
    width = max(
        model.intermediate * (model.moe_layers < model.layers), model.experts_per_token * model.expert_intermediate
    )
    layer = step_tokens * (3 * model.hidden + 3 * -(-width // tensor_parallel)) * 2
    return layer + sequences * model.vocab * SAMPLED_BYTES


def kv_block_bytes(model: ModelSpec, block_size: int, tensor_parallel: int = 1) -> int:
    """Bytes of one block on each device; KV heads are split among the devices, and copied when there are too few."""
    heads = -(-model.kv_heads // tensor_parallel)
    return block_size * model.kv_bytes_per_token * heads // model.kv_heads


def kv_blocks(
    model: ModelSpec,
    hardware: HardwareProfile,
    *,
    block_size: int = 16,
    utilisation: float = UTILISATION,
    tensor_parallel: int = 1,
    step_tokens: int = 2048,
    sequences: int = 256,
    data_parallel_attention: bool = False,
) -> int:
    """KV blocks of all devices together that fit beside weights, activations and the runtime.

    A block is divided among the devices, or, if attention is data-parallel, whole on one of them.
    Raises ConfigError if not one fits.
    """
    budget = int(hardware.memory_bytes * utilisation)
    weights = weight_bytes(model, tensor_parallel, whole_attention=data_parallel_attention)
    reserve = activation_bytes(model, step_tokens, sequences, tensor_parallel) + round(hardware.runtime_gib * GIB)
    sharing = 1 if data_parallel_attention else tensor_parallel
    blocks = (budget - weights - reserve) // kv_block_bytes(model, block_size, sharing)
    if blocks < 1:
        raise ConfigError(
            f"{model.name} does not fit {hardware.name}: of {budget / GIB:.1f} GiB, {weights / GIB:.1f} GiB of weights "
            f"and {reserve / GIB:.1f} GiB to compute leave nothing for the KV cache; use more devices, another dtype "
            "or smaller steps"
        )
    return blocks * tensor_parallel // sharing


EVENTS_KEPT = 1024
"""Block events that a replica keeps for its router, which reads them after each step."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a replica is: a pool of blocks of ``block_bytes`` on all its devices, and how long its steps take.

    request_seconds, request_token_seconds: what each request and each token of its prompt costs beside its steps.

    >>> machine = machine_of(SimulationConfig(model="llama-3.1-8b", hardware="h100"), block_size=16)
    >>> machine.block_bytes, machine.num_blocks
    (2097152, 28397)
    >>> round(machine.timer.decode_seconds(sequences=1, context=1000), 3)
    0.006
    """

    block_size: int
    num_blocks: int
    block_bytes: int
    timer: StepTimer
    block_cost: BlockCost = uniform_cost
    request_seconds: float = 0.0
    request_token_seconds: float = 0.0
    profile: HardwareProfile | None = None
    model: ModelSpec | None = None


def root_of(config: SimulationConfig, block_size: int) -> RootOf:
    """The parent hash of each request's first block: chains with different salts share nothing, as in the server."""

    root = root_hash("simulated", block_size)
    if not config.salted:
        return lambda request: root

    @cache
    def of_salt(salt: bytes) -> BlockHash:
        return salted(root, salt)

    return lambda request: of_salt(request.client_id.encode())


def recompute_cost(model: ModelSpec, block_size: int) -> BlockCost:
    """What recomputing a block costs in floating-point operations, against its bytes; as the server has it.

    Two operations per weight and token, and four per query channel and key seen: later blocks cost more.
    """
    linear = 2.0 * model.active_parameters * block_size
    per_key = 4.0 * model.layers * model.query_size * block_size
    size = float(model.kv_bytes_per_token * block_size)
    return cache(lambda position: EntryCost(size, linear + per_key * position * block_size))


def machine_of(config: SimulationConfig, block_size: int) -> Machine:
    """The machine that a configuration describes. Raises ConfigError for unknown names, or a model that does not
    fit."""
    if config.rates is not None:
        rates = config.rates
        timer = ConstantRates(rates.per_step, rates.per_prefill_token, rates.per_decode_token)
        return Machine(block_size, config.kv_blocks or 1, rates.kv_bytes_per_token * block_size, timer)
    profile = load_profile(config.hardware)
    emberkv_serves = profile.measured_with is not None  # `calibrate` measures emberkv's own server
    model = load_spec(config.model).with_dtypes(weights=config.weights, kv=config.kv, on_load=emberkv_serves)
    if config.memory is not None:
        profile = profile.model_copy(update={"memory_gib": config.memory / GIB})
    layout = Layout(config.expert_parallel, config.data_parallel_attention, config.peer_access)
    roofline = Roofline(model, profile, tensor_parallel=config.tensor_parallel, layout=layout)
    sharing = 1 if layout.data_parallel_attention else config.tensor_parallel
    return Machine(
        block_size,
        config.kv_blocks or _blocks(config, model, profile, block_size),
        kv_block_bytes(model, block_size, sharing) * sharing,
        roofline,
        recompute_cost(model, block_size),
        profile.request_us * MICROSECOND,
        profile.request_token_us * MICROSECOND,
        profile,
        model,
    )


def _blocks(config: SimulationConfig, model: ModelSpec, profile: HardwareProfile, block_size: int) -> int:
    blocks = kv_blocks(
        model, profile, block_size=block_size, tensor_parallel=config.tensor_parallel,
        step_tokens=config.max_step_tokens, sequences=config.max_running,
        data_parallel_attention=config.data_parallel_attention,
    )  # fmt: skip
    if blocks * config.replicas > MOST_BLOCKS:
        raise ConfigError(
            f"the memory of all replicas holds {blocks * config.replicas:,} KV blocks of {block_size} tokens; at most "
            f"{MOST_BLOCKS:,} can be simulated: use larger blocks or less memory"
        )
    return blocks


def routers_of(config: SimulationConfig, rng: Random, record: Recorder | None) -> tuple[list[Router], int]:
    """Each gateway's router, and how many block events a replica's pool is to keep for them: none where they read none.

    record: takes their decisions.
    """
    routers = [make_router(config.routing, rng, names(config.replicas)) for _ in range(config.gateways)]
    for router in routers:
        router.record = record
    return routers, EVENTS_KEPT if config.replicas > 1 and routers[0].index is not None else 0


def cache_of(config: SimulationConfig, machine: Machine, *, tails: bool, events_kept: int) -> PrefixCache:
    """A fresh cache over an empty pool. tails: whether hits go on into partial blocks. events_kept: as in
    `routers_of`.
    """
    pool = BlockPool(
        machine.num_blocks,
        machine.block_size,
        policy=make_policy(config.eviction),
        block_cost=machine.block_cost,
        events=EventLog(events_kept),
        journal=bool(config.tiers),
    )
    alignment = _rounded_up(config.hit_unit or machine.block_size, machine.block_size)
    return PrefixCache(pool, alignment=alignment, batch_invariant=tails, enabled=config.prefix_caching)


def tier_of(tier: ModelledTierConfig, machine: Machine) -> ModelledTier:
    """An empty tier. Raises ConfigError where neither the configuration nor the hardware's profile knows its rates."""
    known = machine.profile.tiers.get(tier.name) if machine.profile is not None else None
    read, write, latency = tier.read_gb_per_s, tier.write_gb_per_s, tier.latency_us
    if known is not None:
        read, write = read or known.read_gb_per_s, write or known.write_gb_per_s
        latency = known.latency_us if latency is None else latency
    if read is None or write is None:
        raise ConfigError(f"tier {tier.name!r} needs read_gb_per_s and write_gb_per_s: the hardware has no such tier")
    seconds = (latency or 0.0) * MICROSECOND
    return ModelledTier(
        tier.name,
        tier.capacity // machine.block_bytes,
        machine.block_bytes,
        make_policy(tier.eviction),
        read=Channel(read * GB, seconds),
        write=Channel(write * GB, seconds),
        keeps=tier.keeps or tier.shared,
    )


def lower_of(config: SimulationConfig, machine: Machine) -> list[ModelledTiers | None]:
    """The tiers below each replica's pool."""
    if not config.tiers:
        return [None] * config.replicas
    shared = {tier.name: tier_of(tier, machine) for tier in config.tiers if tier.shared}
    return [
        ModelledTiers([shared.get(tier.name) or tier_of(tier, machine) for tier in config.tiers])
        for _ in range(config.replicas)
    ]


def _index_tiers(
    config: SimulationConfig, machine: Machine, routers: Sequence[Router], replicas: Sequence[Replica]
) -> None:
    """Make the routers' indexes follow the tiers below each pool, and the replicas' states have the tiers' rates."""
    indexes = [router.index for router in routers if router.index is not None]
    if not indexes or len(replicas) == 1:
        return
    shared = {tier.name: tier.name.encode() for tier in config.tiers if tier.shared}
    for replica in replicas:
        for index in indexes:
            index.share(replica.index, shared)
        rates = {}
        for tier in replica.lower.tiers if replica.lower is not None else ():
            tier.on_stored = partial(_stored, indexes, replica.index, tier.name)
            tier.on_removed = partial(_removed, indexes, replica.index, tier.name)
            rates[tier.name] = tier.read.bandwidth / machine.block_bytes * machine.block_size
        replica.state.load_rates = rates


def _stored(indexes: Sequence[BlockIndex], replica: int, tier: str, block_hash: BlockHash) -> None:
    for index in indexes:
        index.add(replica, (block_hash,), tier)


def _removed(indexes: Sequence[BlockIndex], replica: int, tier: str, block_hash: BlockHash) -> None:
    for index in indexes:
        index.remove(replica, (block_hash,), tier)


def scheduler_of(
    config: SimulationConfig, machine: Machine, lower: ModelledTiers | None, events_kept: int
) -> Scheduler:
    """A fresh scheduler, cache and pool, as the server has them. events_kept: see `routers_of`."""
    cache = cache_of(config, machine, tails=config.hit_unit == 1, events_kept=events_kept)
    chunk = _rounded_up(config.prefill_chunk, cache.alignment)
    budget = max(chunk, config.max_step_tokens)
    limits = SchedulerConfig(
        chunk, budget, config.max_running, config.tenant_weights, separate_long_prompts=config.separate_long_prompts
    )
    return Scheduler(cache, limits, lower)


def _rounded_up(tokens: int, unit: int) -> int:
    return -(-tokens // unit) * unit


def build(
    config: SimulationConfig,
    machine: Machine,
    source: Source,
    emit: Callable[[RequestOutcome], None],
    progress: Progress,
    record: Recorder | None = None,
) -> Simulator:
    """A simulation that has not begun. One seed decides everything in it that is drawn.

    record: takes routing decisions.
    """
    rng = Random(f"{config.seed}/simulation")
    routers, events_kept = routers_of(config, rng, record)
    clock = StepClock(machine.timer)
    replicas = [
        Replica(
            index,
            partial(scheduler_of, config, machine, lower, events_kept),
            clock,
            config.together,
            lower,
            followed=events_kept > 0,
        )
        for index, lower in enumerate(lower_of(config, machine))
    ]
    _index_tiers(config, machine, routers, replicas)
    planned = [Outage(each.replica, each.at, each.down_for) for each in config.outages]
    chance = config.random_outages
    drawn = None if chance is None else RandomOutages(chance.mean_time_up, chance.mean_time_down)
    return Simulator(
        source,
        replicas,
        routers,
        root_of=root_of(config, machine.block_size),
        block_size=machine.block_size,
        emit=emit,
        outages=outages(planned, drawn, config.replicas, rng),
        max_retries=config.max_retries,
        request_seconds=machine.request_seconds,
        request_token_seconds=machine.request_token_seconds,
        stop_at=config.stop_at,
        tenants=config.salted or bool(config.tenant_weights),
        progress=progress,
    )


@dataclass(frozen=True, slots=True)
class SimulatedSystem:
    """What a simulation computed: model, hardware and replicas.

    model, hardware: None where three times (``rates``) stand for both. kv_bytes, kv_blocks: of one replica.
    defaults: which of model and hardware were given neither by a file nor by an option nor by a recording.

    >>> config = SimulationConfig(hardware="h100", replicas=2)
    >>> found = about(config, machine_of(config, block_size=16))
    >>> found.machine_text, found.defaults
    ('llama-3.1-8b (bf16) on H100 SXM', ('model',))
    """

    version: str
    model: str | None
    weights: str | None
    hardware: str | None
    devices: int
    replicas: int
    routing: str
    kv_bytes: int
    kv_blocks: int
    block_size: int
    defaults: tuple[str, ...]
    measured_with: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"defaults": list(self.defaults)}

    @property
    def machine_text(self) -> str:
        """One replica: its model and devices."""
        if self.model is None:
            return "a machine given by its rates"
        devices = self.hardware if self.devices == 1 else f"{self.devices} x {self.hardware}"
        return f"{self.model} ({self.weights}) on {devices}"

    @property
    def memory_text(self) -> str:
        return (
            f"{format_size(self.kv_bytes)} of KV memory, {self.kv_blocks:,} blocks of "
            f"{format_count(self.block_size, 'token')}"
        )

    @property
    def sentence(self) -> str:
        """The set-up in one sentence."""
        routed = f", routed by {self.routing}" if self.replicas > 1 else ""
        each = ", each with " if self.replicas > 1 else " with "
        return f"{self.machine_text}: {format_count(self.replicas, 'replica')}{routed}{each}{self.memory_text}."

    @property
    def measured_sentence(self) -> str | None:
        """One sentence where the hardware was measured with other number types; else None."""
        if self.measured_with is None:
            return None
        return (
            f"{self.hardware} was measured with {self.measured_with}; the model has other types, so that times follow "
            "from bytes and operations alone: calibrate with the same types, or set weights and kv."
        )

    @property
    def defaults_sentence(self) -> str | None:
        """One sentence; None where nothing was left to a default."""
        if not self.defaults:
            return None
        names = " and ".join(self.defaults)
        options = " and ".join(f"--{name}" for name in self.defaults)
        is_default = "is the default" if len(self.defaults) == 1 else "are defaults"
        return f"{names.capitalize()} {is_default}; {options} or the file's key simulation say otherwise."


def about(config: SimulationConfig, machine: Machine) -> SimulatedSystem:
    model, profile = machine.model, machine.profile
    chosen = config.model_fields_set
    return SimulatedSystem(
        version=__version__,
        model=None if model is None else model.name,
        weights=None if model is None else model.weights_dtype,
        hardware=None if profile is None else profile.name,
        devices=config.tensor_parallel,
        replicas=config.replicas,
        routing=config.routing,
        kv_bytes=machine.num_blocks * machine.block_bytes,
        kv_blocks=machine.num_blocks,
        block_size=machine.block_size,
        defaults=tuple(name for name in ("model", "hardware") if name not in chosen and model is not None),
        measured_with=None if model is None or profile is None else _other_types(model, profile),
    )


def _other_types(model: ModelSpec, profile: HardwareProfile) -> str | None:
    """What a profile was measured with, where the model has other number types."""
    with_types = profile.measured_with
    if with_types is None or (with_types.weights, with_types.kv) == (model.weights_dtype, model.kv_dtype):
        return None
    return str(with_types)
