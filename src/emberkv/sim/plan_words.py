"""A plan in plain sentences."""

from collections.abc import Iterator

from emberkv.sim.planner import UTILISED, Plan, SetUpPoint
from emberkv.sim.words import count_words, rate_words, seconds_words, share_words, size_words, tier_words

_LEVELS = {"ttft_ms": "time to first token", "tpot_ms": "time for each further token", "e2e_ms": "time end to end"}


def get_this(plan: Plan) -> list[str]:
    """The set-up to get, its price and the reasons, a sentence or two each; or why there is none."""
    return list(_get_this(plan))


def recommendation(plan: Plan) -> list[str]:
    """What is known of sizes, tiers and machines, a sentence or two each."""
    return list(_sentences(plan))


def set_up_words(plan: Plan, point: SetUpPoint) -> str:
    replicas = count_words(point.replicas, "replica")
    devices = point.replicas * plan.about.devices
    on = f" on {devices} x {plan.about.hardware}" if plan.about.hardware else ""
    beside = f" and {size_words(point.tier_bytes)} of {tier_words(point.tier)} for the cache" if point.tier else ""
    each = " each" if point.replicas > 1 else ""
    return f"{replicas}{on}, with {size_words(plan.pool_bytes)} of KV memory{beside}{each}"


def price_words(plan: Plan, point: SetUpPoint) -> str | None:
    """Dollars an hour; None where no price is known."""
    if plan.price_per_hour is None:
        return None
    return f"${point.replicas * plan.about.devices * plan.price_per_hour:,.2f} an hour"


def _get_this(plan: Plan) -> Iterator[str]:
    point = plan.get
    if point is None:
        yield from _nothing_serves(plan)
        return
    price = price_words(plan, point)
    yield f"Get {set_up_words(plan, point)}{f': {price}' if price else ''}."
    found = point.simulated
    if found is None:
        yield (
            f"By formula, not simulated: it takes the busiest {rate_words(plan.demand.busiest or 0)} requests a second "
            f"with {1 - UTILISED:.0%} to spare."
        )
        return
    kept = [f"{_LEVELS[name]} p99 within {seconds_words(target / 1e3)}" for name, target in plan.slo if target]
    goal = f"keeps {' and '.join(kept)}" if kept else "serves all that arrives"
    yield (
        f"It is the smallest of the set-ups simulated that {goal}: {share_words(found.hit_rate)} of prompt tokens "
        f"found, mean time to first token {seconds_words(found.mean_ttft)}, p99 {seconds_words(found.p99_ttft)}."
    )
    if plan.price_per_hour is None:
        yield "No price is known: --price-per-hour takes that of one device."
    yield from _rejected(found.rejected)
    yield from _others(plan, point)


def _rejected(rejected: int) -> Iterator[str]:
    if rejected:
        yield f"{count_words(rejected, 'request')} would never fit its KV memory."


def _others(plan: Plan, chosen: SetUpPoint) -> Iterator[str]:
    """Why nothing smaller, and what would cost more."""
    for point in plan.set_ups:
        found = point.simulated
        if found is None or point == chosen:
            continue
        if found.serves:
            yield f"{set_up_words(plan, point)} would serve, too."
        elif point.replicas in (chosen.replicas, chosen.replicas - 1):
            yield f"Not {set_up_words(plan, point)}: {_failing(plan, point)}."


def _failing(plan: Plan, point: SetUpPoint) -> str:
    found = point.simulated
    assert found is not None
    if found.load is not None and found.load.grows:
        served, asked = rate_words(found.load.served_per_second), rate_words(found.load.asked_per_second)
        return f"it serves {served} of {asked} requests a second and the queue grows without end"
    missed = " and ".join(_LEVELS[name] for name in found.missed)
    return f"its p99 misses the {missed} ({seconds_words(found.p99_ttft)} to the first token)"


def _nothing_serves(plan: Plan) -> Iterator[str]:
    ran = [point for point in plan.set_ups if point.simulated is not None]
    if not ran:
        yield "None of these set-ups serves the busiest time by formula; more --replicas or other --hardware may."
        return
    largest = max(ran, key=lambda point: (point.replicas, point.tier_bytes))
    yield (
        f"No set-up tried serves this workload. The largest, {set_up_words(plan, largest)}: {_failing(plan, largest)}."
    )
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
        yield f"No size captures {plan.wanted:.0%} of that; {size_words(largest.bytes)} captures {share:.0%}{sure}."
        return
    words = f"{size_words(point.bytes)} captures {point.hit_rate / plan.unlimited:.0%} of what is reusable{sure}"
    if plan.eviction == "lru":
        words += f"; beyond {size_words(plan.enough)} nothing changes"
    yield f"{words}."
    least = next((size for size in plan.sizes if size.best_possible >= point.hit_rate), point)
    if least.bytes < point.bytes:
        yield (
            f"A policy that knew the future would need {size_words(least.bytes)} for as much; "
            f"{plan.eviction.upper()} needs the rest because it cannot."
        )


def _loading(plan: Plan) -> Iterator[str]:
    for tier, load in plan.load_token.items():
        ratio = plan.prefill_token / load
        verdict = f"{ratio:,.1f} times as fast as" if ratio >= 1 else "slower than"
        yield (
            f"Fetching a prompt token from {tier_words(tier)} takes {seconds_words(load)}, {verdict} computing it "
            f"({seconds_words(plan.prefill_token)})."
        )


def _machines(plan: Plan) -> Iterator[str]:
    rate, busiest = plan.demand.rate, plan.demand.busiest
    if rate is None or busiest is None:
        return
    yield f"The workload asks for {rate_words(rate)} requests a second, {rate_words(busiest)} at its busiest."
    fewest = min(plan.set_ups, key=lambda point: point.replicas).replicas
    most = max(plan.set_ups, key=lambda point: point.replicas).replicas
    ran = [point.simulated for point in plan.set_ups if point.simulated is not None]
    of = f"{max(found.completed + found.rejected for found in ran):,} of {plan.demand.requests:,}" if ran else ""
    tried = f"; simulated were the first {of} requests" if ran else ""
    yield (
        f"Tried were {fewest} to {most} replicas, beginning with as many as keep {1 - UTILISED:.0%} of what they could "
        f"serve to spare by formula{tried}."
    )
