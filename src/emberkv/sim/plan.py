"""A plan, as data and in plain sentences: hit rates by size, set-ups, and the one to get."""

from collections.abc import Iterator
from dataclasses import dataclass

from emberkv.sim.build import SimulatedSystem
from emberkv.sim.config import Targets
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share, format_size, format_tier
from emberkv.sim.plan_times import Demand
from emberkv.sim.summary import OfferedLoad

MAX_UTILISATION = 0.8
"""Share of what replicas could serve at most up to which a plan loads them; beyond it, queues grow long."""


@dataclass(frozen=True, slots=True)
class SizePoint:
    """A cache of ``bytes``. Rates are shares of all prompt tokens: found by the policy, and by the best possible one.

    >>> point = SizePoint(bytes=2**30, blocks=512, hit_rate=0.5, best_possible=0.625)
    >>> point.best_possible - point.hit_rate
    0.125
    """

    bytes: int
    blocks: int
    hit_rate: float
    best_possible: float


@dataclass(frozen=True, slots=True)
class SimulationFigures:
    """What the simulation of the first requests found; times in seconds, queueing included.

    rejected: requests that never fit. load: None where all requests arrive at once. p99_tpot: None without answers of
    two tokens. missed: the service levels that 1% or more of the requests do not keep, by name.

    >>> found = SimulationFigures(900, 0, hit_rate=0.5, mean_ttft=0.2, p99_ttft=1.5, p99_tpot=0.02,
    ...                           requests_per_second=2.0, missed=("ttft_ms",))
    >>> found.serves
    False
    """

    completed: int
    rejected: int
    hit_rate: float
    mean_ttft: float
    p99_ttft: float
    p99_tpot: float | None
    requests_per_second: float
    load: OfferedLoad | None = None
    missed: tuple[str, ...] = ()

    @property
    def serves(self) -> bool:
        """Whether the set-up keeps up with what arrives, within the service levels."""
        return not self.missed and (self.load is None or not self.load.grows)


@dataclass(frozen=True, slots=True)
class SetUpPoint:
    """A number of replicas, each with ``tier_bytes`` of a lower tier.

    hit_rate, first_token (seconds, no queueing) and most_requests_per_second (of all replicas together) come from the
    curve and formulas, as if each request found the replica that has its prefix. simulated: None where it was not.

    >>> point = SetUpPoint(2, "ram", 2**36, hit_rate=0.5, first_token=0.1, most_requests_per_second=20.0)
    >>> point.replicas * point.tier_bytes // 2**30
    128
    """

    replicas: int
    tier: str | None
    tier_bytes: int
    hit_rate: float
    first_token: float
    most_requests_per_second: float
    simulated: SimulationFigures | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Hit rates by cache size, the set-ups that were tried, and the one to get.

    about: the set-up of one replica. simulated_requests: how many of the workload's first requests the simulations had,
    those of a warm-up included; 0 where none ran. stop_at: the configured one, in seconds, if it ended the simulations;
    None: it did not. slo: milliseconds that 99% of the requests must keep. price_per_hour: of one device, in dollars;
    None where it is not known. get: the set-up to get: of those that serve, the one of the fewest devices, then of the
    least memory below; None where none serves.

    content_known: whether the workload says what prompts share. error: of all hit rates from the curve; None: exact.
    pool_bytes: of one replica. unlimited: share of prompt tokens that a cache without limit finds. wanted: the share
    of that which recommended_size is for: the first in ``sizes`` that captures it, None where nothing can be reused.
    enough: bytes beyond which LRU finds no more. prefill_token, load_token: seconds to compute a prompt token, or to
    load it from each kind of tier, in a prompt of mean length.

    >>> import emberkv
    >>> client = {"name": "chat", "weight": 1, "message": 40, "output": 8, "turns": 3, "think_time": 5}
    >>> chat = {"sessions": 4, "seed": 1, "arrivals": {"kind": "poisson", "rate": 1.0}, "clients": [client]}
    >>> plan = emberkv.plan({"workload": chat}, model="llama-3.1-8b", hardware="h100", simulate=False)
    >>> plan.get.replicas, round(plan.unlimited, 2), plan.error
    (1, 0.55, None)
    """

    about: SimulatedSystem
    demand: Demand
    simulated_requests: int
    stop_at: float | None
    slo: Targets
    price_per_hour: float | None
    get: SetUpPoint | None
    content_known: bool
    eviction: str
    routing: str
    error: float | None
    block_size: int
    block_bytes: int
    pool_bytes: int
    unlimited: float
    wanted: float
    enough: int
    recommended_size: SizePoint | None
    prefill_token: float
    load_token: dict[str, float]
    sizes: list[SizePoint]
    set_ups: list[SetUpPoint]


_LEVELS = {"ttft_ms": "time to first token", "tpot_ms": "time for each further token", "e2e_ms": "time end to end"}


def get_this(plan: Plan) -> list[str]:
    """The set-up to get, its price and the reasons, one or two sentences each; or why there is none."""
    return list(_get_this(plan))


def recommendation(plan: Plan) -> list[str]:
    """What is known of sizes, tiers and machines, one or two sentences each."""
    return list(_sentences(plan))


def describe_set_up(plan: Plan, point: SetUpPoint) -> str:
    """A set-up in words: ``2 replicas on 2 x H100 SXM, with 55.5 GiB of KV memory each``."""
    replicas = format_count(point.replicas, "replica")
    devices = point.replicas * plan.about.devices
    on = f" on {devices} x {plan.about.hardware}" if plan.about.hardware else ""
    beside = f" and {format_size(point.tier_bytes)} of {format_tier(point.tier)} for the cache" if point.tier else ""
    each = " each" if point.replicas > 1 else ""
    return f"{replicas}{on}, with {format_size(plan.pool_bytes)} of KV memory{beside}{each}"


def format_price(plan: Plan, point: SetUpPoint) -> str | None:
    """Dollars an hour; None where no price is known."""
    if plan.price_per_hour is None:
        return None
    return f"${point.replicas * plan.about.devices * plan.price_per_hour:,.2f} an hour"


def _get_this(plan: Plan) -> Iterator[str]:
    point = plan.get
    if point is None:
        yield from _nothing_serves(plan)
        return
    price = format_price(plan, point)
    yield f"Get {describe_set_up(plan, point)}{f': {price}' if price else ''}."
    found = point.simulated
    if found is None:
        yield (
            f"By formula, not simulated: it takes the busiest {format_rate(plan.demand.busiest or 0)} requests a "
            f"second with {1 - MAX_UTILISATION:.0%} to spare."
        )
        return
    kept = [f"{_LEVELS[name]} p99 within {format_seconds(target / 1e3)}" for name, target in plan.slo if target]
    goal = f"keeps {' and '.join(kept)}" if kept else "serves all that arrives"
    yield (
        f"It is the smallest of the set-ups simulated that {goal}: {format_share(found.hit_rate)} of prompt tokens "
        f"found, mean time to first token {format_seconds(found.mean_ttft)}, p99 {format_seconds(found.p99_ttft)}."
    )
    yield from _judged_by(plan)
    if plan.price_per_hour is None:
        yield "No price is known: --price-per-hour takes that of one device."
    yield from _rejected(found.rejected)
    yield from _others(plan, point)


def _judged_by(plan: Plan) -> Iterator[str]:
    """How much of the workload the simulations cover, where that is not all of it."""
    if plan.simulated_requests == plan.demand.requests:
        return
    first = f"This is judged by the first {plan.simulated_requests:,} of {plan.demand.requests:,} requests"
    yield f"{first}; --requests takes more." if plan.stop_at is None else f"{first}, up to stop_at, {plan.stop_at:g} s."


def _rejected(rejected: int) -> Iterator[str]:
    if rejected:
        yield f"{format_count(rejected, 'request')} would never fit its KV memory."


def _others(plan: Plan, chosen: SetUpPoint) -> Iterator[str]:
    """Why no smaller set-up serves, and which others would."""
    for point in plan.set_ups:
        found = point.simulated
        if found is None or point == chosen:
            continue
        if found.serves:
            yield f"{describe_set_up(plan, point)} would serve, too."
        elif point.replicas in (chosen.replicas, chosen.replicas - 1):
            yield f"Not {describe_set_up(plan, point)}: {_failing(plan, point)}."


def _failing(plan: Plan, point: SetUpPoint) -> str:
    found = point.simulated
    assert found is not None
    if found.load is not None and found.load.grows:
        served, asked = format_rate(found.load.served_per_second), format_rate(found.load.asked_per_second)
        return f"it serves {served} of {asked} requests a second and the queue grows without end"
    p99 = {"ttft_ms": found.p99_ttft, "tpot_ms": found.p99_tpot, "e2e_ms": None}
    shown = {name: f" ({format_seconds(seconds)})" if seconds else "" for name, seconds in p99.items()}
    return f"its p99 misses the {' and '.join(_LEVELS[name] + shown[name] for name in found.missed)}"


def _nothing_serves(plan: Plan) -> Iterator[str]:
    ran = [point for point in plan.set_ups if point.simulated is not None]
    if not ran:
        yield "None of these set-ups serves the busiest time by formula; more --replicas or other --hardware may."
        return
    largest = max(ran, key=lambda point: (point.replicas, point.tier_bytes))
    yield (
        f"No set-up tried serves this workload. The largest, {describe_set_up(plan, largest)}: "
        f"{_failing(plan, largest)}."
    )
    yield from _judged_by(plan)
    smaller = [point for point in ran if point.tier == largest.tier and point.replicas < largest.replicas]
    if smaller and not (largest.simulated and largest.simulated.load and largest.simulated.load.grows):
        yield "More replicas did not help: look at --routing, at the longest prompts, or at faster --hardware."


def _sentences(plan: Plan) -> Iterator[str]:
    if not plan.content_known:
        yield "The workload does not say what prompts share, so nothing is known of what a cache would find."
    elif not plan.unlimited:
        yield "No two prompts begin alike: no cache finds anything."
    else:
        yield from _sizes(plan)
        yield from _loading(plan)
    yield from _machines(plan)


def _sizes(plan: Plan) -> Iterator[str]:
    yield f"Of all prompt tokens, {plan.unlimited:.1%} can be reused: that is what a cache without limit finds."
    sure = "" if plan.error is None else f" (from a sample; at most about {plan.error:.3f} off)"
    point = plan.recommended_size
    if point is None:
        largest = plan.sizes[-1]
        share = largest.hit_rate / plan.unlimited
        yield f"No size captures {plan.wanted:.0%} of that; {format_size(largest.bytes)} captures {share:.0%}{sure}."
        return
    words = f"{format_size(point.bytes)} captures {point.hit_rate / plan.unlimited:.0%} of what is reusable{sure}"
    if plan.eviction == "lru":
        words += f"; beyond {format_size(plan.enough)} nothing changes"
    yield f"{words}."
    least = next((size for size in plan.sizes if size.best_possible >= point.hit_rate), point)
    if least.bytes < point.bytes:
        yield (
            f"A policy that knew the future would need {format_size(least.bytes)} for as much; "
            f"{plan.eviction.upper()} needs the rest because it cannot."
        )


def _loading(plan: Plan) -> Iterator[str]:
    for tier, load in plan.load_token.items():
        ratio = plan.prefill_token / load
        verdict = f"{ratio:,.1f} times as fast as" if ratio >= 1 else "slower than"
        yield (
            f"Fetching a prompt token from {format_tier(tier)} takes {format_seconds(load)}, {verdict} computing it "
            f"({format_seconds(plan.prefill_token)})."
        )


def _machines(plan: Plan) -> Iterator[str]:
    rate, busiest = plan.demand.rate, plan.demand.busiest
    if rate is None or busiest is None:
        return
    yield f"The workload asks for {format_rate(rate)} requests a second, {format_rate(busiest)} at its busiest."
    fewest = min(plan.set_ups, key=lambda point: point.replicas).replicas
    most = max(plan.set_ups, key=lambda point: point.replicas).replicas
    yield (
        f"From {fewest} to {most} replicas were tried, beginning with as many as have {1 - MAX_UTILISATION:.0%} of "
        "what they could serve to spare by formula."
    )
