"""The planner: what a cache is worth for a workload, by size, and what that means for machines and waiting times."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from emberkv.errors import WorkloadError
from emberkv.sim.capacity_plan import Capacities, SizePoint
from emberkv.sim.config import SimulationConfig, TierConfig, with_changes
from emberkv.sim.curves.curve import first_requests
from emberkv.sim.curves.visits import visits
from emberkv.sim.inputs import Workload
from emberkv.sim.plan_times import Demand, Formulas, demand_of
from emberkv.sim.run import simulate
from emberkv.sim.stage import machine_of, root_of

UTILISED = 0.8
"""Share of what replicas could serve at most up to which a plan loads them; beyond it, queues grow long."""

SIMULATED = 10_000
"""Requests, from the workload's start, that set-ups are simulated with."""

MOST_REPLICAS = 4096

OWN_TIERS = ("ram", "disk")

ROUTING = "consistent-hashing"
"""Unless a plan's configuration says otherwise: like the formulas, it takes a prompt to where its beginning went, be
that still in a pool or in a lower tier.
"""

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What the simulation of the first requests found; times in seconds, queueing included."""

    completed: int
    hit_rate: float
    mean_ttft: float
    p99_ttft: float
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class SetUpPoint:
    """A number of replicas, each with ``tier_bytes`` of a lower tier.

    hit_rate, first_token (seconds, no queueing) and most_requests_per_second (of all replicas together) come from the
    curve and formulas, as if each request found the replica that has its prefix. simulated: None where it was not.
    """

    replicas: int
    tier: str | None
    tier_bytes: int
    hit_rate: float
    first_token: float
    most_requests_per_second: float
    simulated: Simulated | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """told: whether the workload says what prompts share. error: of all hit rates from the curve; None: exact.

    pool_bytes: of one replica. unlimited: share of prompt tokens that a cache without limit finds. wanted: the share of
    that which a size is recommended for: the first one in ``sizes``, None where nothing can be reused. enough: bytes
    beyond which LRU finds no more. prefill_token, load_token: seconds to compute a prompt token, or to fetch it from
    each kind of tier, in a prompt of mean length.
    """

    demand: Demand
    told: bool
    eviction: str
    routing: str
    error: float | None
    block_size: int
    block_bytes: int
    pool_bytes: int
    unlimited: float
    wanted: float
    enough: int
    recommended: SizePoint | None
    prefill_token: float
    load_token: dict[str, float]
    sizes: list[SizePoint]
    set_ups: list[SetUpPoint]


class Planner:
    """Makes a plan for a workload and the set-up that a configuration describes.

    Raises WorkloadError when the workload cannot be read or has no requests, ConfigError for unknown names.
    """

    def __init__(self, workload: Workload, config: SimulationConfig, *, wanted: float = 0.9) -> None:
        if "routing" not in config.model_fields_set:
            config = with_changes(config, {"routing": ROUTING})
        self._workload, self._config, self._wanted = workload, config, wanted
        self._machine = machine_of(config, config.block_size or workload.block_size())
        requests = list(first_requests(workload.source()))
        if not requests:
            raise WorkloadError("the workload has no requests")
        size = self._machine.block_size
        seen = list(visits(requests, size, root_of(config, size)))
        self._told = any(len(request.content) for request in requests)
        self._capacities = Capacities(seen, config.eviction, self._machine)
        self._demand = demand_of(requests)
        self._formulas = Formulas(self._machine, config, self._demand)
        self._stop_at = requests[SIMULATED].arrival_time if len(requests) > SIMULATED else None

    def plan(self, *, replicas: int | None = None, simulating: Told | None = None) -> Plan:
        """replicas: by default as many as the formulas ask for, without and with a lower tier.
        simulating: told what is simulated next; None simulates nothing.
        """
        found = self._capacities
        sizes = found.sizes()
        marks = [point for share in (0.5, self._wanted, 0.99) if (point := _first(sizes, share * found.unlimited))]
        recommended = _first(sizes, self._wanted * found.unlimited)
        set_ups = self._set_ups(marks, recommended, replicas)
        if simulating is not None:
            worth_it = self._worth_simulating(set_ups, recommended)
            set_ups = [self._simulated(each, simulating) if each in worth_it else each for each in set_ups]
        return Plan(
            demand=self._demand,
            told=self._told,
            eviction=self._config.eviction,
            routing=self._config.routing,
            error=found.error,
            block_size=self._machine.block_size,
            block_bytes=self._machine.block_bytes,
            pool_bytes=self._machine.num_blocks * self._machine.block_bytes,
            unlimited=found.unlimited,
            wanted=self._wanted,
            enough=found.enough,
            recommended=recommended,
            prefill_token=self._formulas.prefill_token,
            load_token=self._load_token(),
            sizes=sizes,
            set_ups=set_ups,
        )

    @property
    def _tiers(self) -> list[str]:
        """Those of a machine's own that its profile knows, the fastest first."""
        known = self._machine.profile.tiers if self._machine.profile else {}
        return [tier for tier in OWN_TIERS if tier in known]

    def _load_token(self) -> dict[str, float]:
        profile, tokens = self._machine.profile, max(1.0, self._demand.prompt_tokens)
        if profile is None:
            return {}
        return {tier: self._formulas.load(profile.tiers[tier], tokens) / tokens for tier in self._tiers}

    def _set_ups(self, marks: list[SizePoint], recommended: SizePoint | None, replicas: int | None) -> list[SetUpPoint]:
        """By replicas: without a lower tier, and with each kind of tier at each marked size that exceeds the pools."""
        if replicas is None:
            counts = {self._needed(None, 0)}
            if recommended is not None:
                counts |= {self._needed(tier, recommended.bytes) for tier in self._tiers[:1]}
        else:
            counts = {replicas}
        points = []
        for count in sorted(counts):
            points.append(self._set_up(count, None, 0))
            for tier in self._tiers:
                for size in dict.fromkeys(mark.bytes for mark in marks):
                    if size > count * self._machine.num_blocks * self._machine.block_bytes:
                        points.append(self._set_up(count, tier, size))
        return points

    def _set_up(self, replicas: int, tier: str | None, tier_bytes: int) -> SetUpPoint:
        """tier_bytes: of all replicas together. A tier also has what the pools have: blocks are copied down early."""
        pools = replicas * self._machine.num_blocks
        in_pool = self._capacities.hit_rate(pools)
        if tier is None or self._machine.profile is None:
            in_tier, rates = 0.0, None
        else:
            below = self._capacities.hit_rate(tier_bytes // self._machine.block_bytes)
            in_tier, rates = max(0.0, below - in_pool), self._machine.profile.tiers[tier]
        times = self._formulas.times(in_pool, in_tier, rates)
        each = -(-tier_bytes // replicas)
        most = replicas * times.requests_per_second
        return SetUpPoint(replicas, tier, each, in_pool + in_tier, times.first_token, most)

    def _needed(self, tier: str | None, tier_bytes: int) -> int:
        """The fewest replicas that serve the busiest time with room to spare; 1 where all requests come at once."""
        rate = self._demand.busiest
        if rate is None:
            return 1
        for count in range(1, MOST_REPLICAS):
            if UTILISED * self._set_up(count, tier, tier_bytes).most_requests_per_second >= rate:
                return count
        return MOST_REPLICAS

    def _worth_simulating(self, set_ups: list[SetUpPoint], recommended: SizePoint | None) -> list[SetUpPoint]:
        """For each number of replicas, without a lower tier and with the first one at the recommended size."""
        first = self._tiers[:1]
        return [
            each
            for each in set_ups
            if each.tier is None
            or (each.tier in first and recommended and each.tier_bytes == -(-recommended.bytes // each.replicas))
        ]

    def _simulated(self, point: SetUpPoint, told: Told) -> SetUpPoint:
        told(f"replicas: {point.replicas}, lower tier: {point.tier or 'none'}")
        tiers = [TierConfig(name=point.tier, capacity=point.tier_bytes)] if point.tier else []
        changes = {"replicas": point.replicas, "tiers": tiers, "stop_at": self._stop_at}
        summary = simulate(with_changes(self._config, changes), self._workload).summary
        ttft = summary["ttft_ms"]
        if ttft is None:
            return point
        found = Simulated(
            completed=summary["requests"]["completed"],
            hit_rate=summary["prefix_caching"]["overall_hit_rate"],
            mean_ttft=ttft["mean"] / 1e3,
            p99_ttft=ttft["p99"] / 1e3,
            requests_per_second=summary["throughput"]["requests_per_second"],
        )
        return replace(point, simulated=found)


def _first(sizes: list[SizePoint], hit_rate: float) -> SizePoint | None:
    """The smallest that reaches a hit rate above 0."""
    return next((point for point in sizes if point.hit_rate >= hit_rate > 0), None)
