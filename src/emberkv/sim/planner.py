"""Plans a cache: hit rates by size, what they mean for machines and waiting times, and the set-up to get."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from emberkv.errors import WorkloadError
from emberkv.sim.build import Machine, about, machine_of, root_of
from emberkv.sim.config import (
    ModelledTierConfig,
    SimulationConfig,
    Targets,
    Workload,
    WorkloadSource,
    opened,
    with_changes,
)
from emberkv.sim.curves import Access, Hits, LRUCurve, Optimal, SampledReplay, accesses, first_requests, replay
from emberkv.sim.formatting import format_count, format_size, format_tier
from emberkv.sim.plan import MAX_UTILISATION, Plan, SetUpPoint, SimulationFigures, SizePoint
from emberkv.sim.plan_times import Formulas, demand_of
from emberkv.sim.run import run_simulation
from emberkv.workload.bounds import MOST_REPLICAS

SIMULATED_REQUESTS = 5_000
"""Requests, from the workload's start, that set-ups are simulated with unless said otherwise."""

MAX_TRIES = 6
"""Numbers of replicas that are simulated for one kind of lower tier."""

STEP_UP = 1.25
"""How many times as many replicas are tried next where a service level is missed."""

OWN_TIERS = ("ram", "disk")

HELPFUL_RATIO = 0.95
"""More replicas help if p99 of the time to first token falls to this share or less."""

MAX_REPLAYED = 60_000
"""Block references up to which another policy than LRU is replayed whole; of more, a sample of about as many."""

ProgressCallback = Callable[[str], None]


def round_sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two and one and a half times those, in bytes, from ``smallest`` up to the first that is no less than
    ``largest``.
    """
    sizes: list[int] = []
    power = 2
    while not sizes or sizes[-1] < largest:
        sizes += [size for size in (power, power + power // 2) if size >= smallest]
        power *= 2
    return [size for size in sizes if size < largest] + [min(size for size in sizes if size >= largest)]


@dataclass
class Capacities:
    """Hit rates of a workload's accesses under one policy. error: of all of them; None: they are exact.

    >>> seen = [Access([name], 1, prompt_tokens=16, block_size=16) for name in (b"a", b"b", b"a")]
    >>> machine = machine_of(SimulationConfig(kv_blocks=10), block_size=16)
    >>> capacities = Capacities(seen, "lru", machine)
    >>> capacities.hit_rate(1), round(capacities.hit_rate(2), 3), capacities.error
    (0.0, 0.333, None)
    """

    accesses: list[Access]
    policy: str
    machine: Machine
    error: float | None = None
    lru: LRUCurve = field(init=False)
    _sample: SampledReplay | None = field(init=False, default=None)
    _known: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lru = LRUCurve(self.accesses)
        if self.policy != "lru" and self.lru.asked > MAX_REPLAYED:
            self._sample = SampledReplay(self.accesses, self.lru, MAX_REPLAYED / self.lru.asked)

    @property
    def unlimited(self) -> float:
        return self.lru.unlimited.token_rate

    @property
    def enough(self) -> int:
        """Bytes that find under LRU what a cache without limit finds."""
        return self.lru.enough * self.machine.block_bytes

    def hit_rate(self, capacity: int) -> float:
        """Share of prompt tokens that ``capacity`` blocks find; requests that are larger are refused."""
        if capacity not in self._known:
            self._known[capacity] = self._hits(capacity).token_rate
        return self._known[capacity]

    def _hits(self, capacity: int) -> Hits:
        if capacity >= self.lru.smallest:
            if self.policy == "lru":
                return self.lru.at(capacity)
            if self._sample is not None:
                (hits,), error = self._sample.curve([capacity], self.policy, block_cost=self.machine.block_cost)
                self.error = max(error, self.error or 0.0)
                return hits
        return replay(self.accesses, capacity, self.policy, block_cost=self.machine.block_cost)

    def sizes(self) -> list[SizePoint]:
        """Round sizes, from one that takes the largest request to one beyond which nothing changes."""
        block, best = self.machine.block_bytes, Optimal(self.accesses)
        points = []
        for size in round_sizes(self.lru.smallest * block, self.enough):
            blocks = size // block
            points.append(SizePoint(size, blocks, self.hit_rate(blocks), best.at(blocks).token_rate))
        return points


class Planner:
    """Makes a plan for a workload and the set-up that a configuration describes.

    Raises WorkloadError when the workload cannot be read or has no requests, ConfigError for unknown names.

    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> config, workload = opened({"workload": chat}, {"hardware": "h100"})
    >>> found = Planner(workload, config).plan(simulate=False)
    >>> found.get.replicas, len(found.sizes)
    (1, 5)
    """

    def __init__(
        self,
        workload: Workload,
        config: SimulationConfig,
        *,
        wanted: float = 0.9,
        simulated: int = SIMULATED_REQUESTS,
        on_progress: ProgressCallback = lambda what: None,
    ) -> None:
        """simulated: requests that set-ups are simulated with. on_progress: is called with what is done next."""
        self._workload, self._config, self._wanted = workload, config, wanted
        self._machine = machine_of(config, config.block_size or workload.block_size())
        self._on_progress = on_progress
        on_progress("reading the workload")
        requests = list(first_requests(workload.source()))
        if not requests:
            raise WorkloadError("the workload has no requests")
        size = self._machine.block_size
        seen = list(accesses(requests, size, root_of(config, size)))
        self._content_known = any(len(request.content) for request in requests)
        self._capacities = Capacities(seen, config.eviction, self._machine)
        self._demand = demand_of(requests)
        self._formulas = Formulas(self._machine, config, self._demand)
        cut = requests[simulated].arrival_time if len(requests) > simulated else None
        self._stop_at = min((end for end in (config.stop_at, cut) if end is not None), default=None)
        in_time = sum(config.stop_at is None or each.arrival_time <= config.stop_at for each in requests)
        self._simulated_requests = min(in_time, simulated)

    def plan(self, *, replicas: int | None = None, simulate: bool = True, price_per_hour: float | None = None) -> Plan:
        """replicas: by default as few as serve. simulate: whether set-ups are simulated besides the formulas.
        price_per_hour: of a device, in dollars; the profile's unless given.
        """
        found = self._capacities
        self._on_progress("hit rates by cache size")
        sizes = found.sizes()
        marks = [point for share in (0.5, self._wanted, 0.99) if (point := _first(sizes, share * found.unlimited))]
        recommended = _first(sizes, self._wanted * found.unlimited)
        self._on_progress("times by formula")
        set_ups = self._set_ups(marks, recommended, replicas)
        if simulate:
            ran = self._tried(recommended, replicas)
            kinds = {(each.replicas, each.tier, each.tier_bytes) for each in ran}
            set_ups = [each for each in set_ups if (each.replicas, each.tier, each.tier_bytes) not in kinds] + ran
        order = [None, *self._tiers]
        set_ups.sort(key=lambda each: (each.replicas, order.index(each.tier), each.tier_bytes))
        profile = self._machine.profile
        return Plan(
            about=about(self._config, self._machine),
            demand=self._demand,
            simulated_requests=self._simulated_requests if simulate else 0,
            stop_at=self._stop_at if self._stop_at == self._config.stop_at else None,
            slo=self._config.slo,
            price_per_hour=price_per_hour or (profile.price_per_hour if profile else None),
            get=self._choice(set_ups, simulate),
            content_known=self._content_known,
            eviction=self._config.eviction,
            routing=self._config.routing,
            error=found.error,
            block_size=self._machine.block_size,
            block_bytes=self._machine.block_bytes,
            pool_bytes=self._machine.num_blocks * self._machine.block_bytes,
            unlimited=found.unlimited,
            wanted=self._wanted,
            enough=found.enough,
            recommended_size=recommended,
            prefill_token=self._formulas.prefill_token,
            load_token=self._load_token(),
            sizes=sizes,
            set_ups=set_ups,
        )

    def _choice(self, set_ups: list[SetUpPoint], simulated: bool) -> SetUpPoint | None:
        if simulated:
            good = [each for each in set_ups if each.simulated is not None and each.simulated.serves]
        else:
            rate = self._demand.busiest or 0.0
            good = [each for each in set_ups if MAX_UTILISATION * each.most_requests_per_second >= rate]
        return min(good, key=lambda each: (each.replicas, each.replicas * each.tier_bytes), default=None)

    def _tried(self, recommended: SizePoint | None, replicas: int | None) -> list[SetUpPoint]:
        """Simulated set-ups: without a lower tier, and with the fastest one at the recommended size."""
        kinds: list[tuple[str | None, int]] = [(None, 0)]
        if recommended is not None:
            kinds += [(tier, recommended.bytes) for tier in self._tiers[:1]]
        points: list[SetUpPoint] = []
        for tier, size in kinds:
            if replicas is None:
                points += self._search(tier, size)
            elif tier is None or size > replicas * self._machine.num_blocks * self._machine.block_bytes:
                points.append(self._simulated(self._set_up(replicas, tier, size)))
        return points

    def _search(self, tier: str | None, tier_bytes: int) -> list[SetUpPoint]:
        """Numbers of replicas, from what the formulas ask for to the fewest that serve, as far as `MAX_TRIES` go."""
        tried: dict[int, SetUpPoint] = {}
        count = self._needed(tier, tier_bytes)
        while len(tried) < MAX_TRIES:
            if tier is not None and tier_bytes <= count * self._machine.num_blocks * self._machine.block_bytes:
                break  # the pools alone are as large
            tried[count] = point = self._simulated(self._set_up(count, tier, tier_bytes))
            if point.simulated is None:
                break
            if point.simulated.serves:
                count -= 1
                if not count or count in tried:
                    break
            else:
                load = point.simulated.load
                more = load.least_replicas if load and load.grows else ceil(STEP_UP * count)
                better = [each for each in tried if each > count]
                if count + 1 in better or count == MOST_REPLICAS or not _helped(tried, count):
                    break
                count = min([max(count + 1, more), MOST_REPLICAS, *(each - 1 for each in better)])
        return list(tried.values())

    @property
    def _tiers(self) -> list[str]:
        """The tiers of a machine's own that its profile knows, the fastest first."""
        known = self._machine.profile.tiers if self._machine.profile else {}
        return [tier for tier in OWN_TIERS if tier in known]

    def _load_token(self) -> dict[str, float]:
        profile, tokens = self._machine.profile, max(1.0, self._demand.prompt_tokens)
        if profile is None:
            return {}
        return {tier: self._formulas.load(profile.tiers[tier], tokens) / tokens for tier in self._tiers}

    def _set_ups(self, marks: list[SizePoint], recommended: SizePoint | None, replicas: int | None) -> list[SetUpPoint]:
        """Set-ups by formula: without a lower tier, and with each tier at each marked size that exceeds the pools."""
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
            if MAX_UTILISATION * self._set_up(count, tier, tier_bytes).most_requests_per_second >= rate:
                return count
        return MOST_REPLICAS

    def _simulated(self, point: SetUpPoint) -> SetUpPoint:
        """The same set-up with what its simulation finds."""
        lower = f" with {format_size(point.tier_bytes)} of {format_tier(point.tier)} each" if point.tier else ""
        what = f"simulating {format_count(point.replicas, 'replica')}{lower}"
        self._on_progress(what)
        tiers = [ModelledTierConfig(name=point.tier, capacity=point.tier_bytes)] if point.tier else []
        tiers += [tier for tier in self._config.tiers if tier.shared and tier.name != point.tier]
        changes = {"replicas": point.replicas, "tiers": tiers, "outages": [], "stop_at": self._stop_at}

        def progress(done: int, now: float) -> None:
            self._on_progress(f"{what}: {done:,} of about {self._simulated_requests:,} requests")

        results = run_simulation(with_changes(self._config, changes), self._workload, progress=progress)
        summary = results.summary
        ttft, tpot = summary["ttft_ms"], summary["tpot_ms"]
        if ttft is None:
            return point
        found = SimulationFigures(
            completed=summary["requests"]["completed"],
            rejected=summary["requests"]["rejected"],
            hit_rate=summary["prefix_caching"]["token_hit_rate"],
            mean_ttft=ttft["mean"] / 1e3,
            p99_ttft=ttft["p99"] / 1e3,
            p99_tpot=tpot and tpot["p99"] / 1e3,
            requests_per_second=summary["throughput"]["requests_per_second"],
            load=results.load,
            missed=_missed(self._config.slo, summary),
        )
        return replace(point, simulated=found)


def _helped(tried: dict[int, SetUpPoint], count: int) -> bool:
    """Whether ``count`` replicas do better than the most that were fewer; True where none were."""
    fewer = [each for each in tried if each < count]
    if not fewer:
        return True
    before, now = tried[max(fewer)].simulated, tried[count].simulated
    return before is None or now is None or now.p99_ttft <= HELPFUL_RATIO * before.p99_ttft


def _missed(slo: Targets, summary: dict[str, Any]) -> tuple[str, ...]:
    """The targets that the 99th percentile exceeds."""
    percentiles = {"ttft_ms": summary["ttft_ms"], "tpot_ms": summary["tpot_ms"], "e2e_ms": summary["e2e_latency_ms"]}
    return tuple(
        name for name, target in slo if target is not None and percentiles[name] and percentiles[name]["p99"] > target
    )


def _first(sizes: list[SizePoint], hit_rate: float) -> SizePoint | None:
    """The smallest that reaches a hit rate above 0."""
    return next((point for point in sizes if point.hit_rate >= hit_rate > 0), None)


def plan(
    workload: WorkloadSource,
    *,
    replicas: int | None = None,
    capture: float = 0.9,
    simulate: bool = True,
    requests: int = SIMULATED_REQUESTS,
    price_per_hour: float | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Plan:
    """Say what a cache of each size would find of a workload, and which set-up to get.

    replicas: by default as few as serve. capture: the share of what is reusable that the recommended size finds.
    simulate: whether set-ups are simulated, with the first ``requests`` of the workload, besides the formulas.
    price_per_hour: of one device, in dollars. progress: called with what is done next. settings and errors are those of
    `simulate`. `emberkv.sim.plan.get_this` puts the result into sentences.

    >>> import emberkv
    >>> from emberkv.sim.plan import get_this
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> found = emberkv.plan({"workload": chat}, model="llama-3.1-8b", hardware="h100")
    >>> get_this(found)[0]
    'Get 1 replica on 1 x H100 SXM, with 55.5 GiB of KV memory.'
    """
    config, found = opened(workload, settings)
    planner = Planner(found, config, wanted=capture, simulated=requests, on_progress=progress or (lambda what: None))
    return planner.plan(replicas=replicas, simulate=simulate, price_per_hour=price_per_hour)
