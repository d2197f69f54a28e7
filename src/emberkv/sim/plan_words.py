"""The adviser: a plan in plain sentences; every number in them is the plan's."""

from collections.abc import Iterator

from emberkv.sim.planner import UTILISED, Plan, SetUpPoint

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size_words(size: int) -> str:
    """Bytes in the largest unit of which there is at least one, to three digits: 1.5 TiB, 55.4 GiB, 768 MiB."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.{0 if value >= 100 or value == int(value) else 1}f} {UNITS[unit]}"


def seconds_words(seconds: float) -> str:
    """In the unit that reads best."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} us"


def recommendation(plan: Plan) -> list[str]:
    """What to do, a sentence or two each."""
    return list(_sentences(plan))


def _sentences(plan: Plan) -> Iterator[str]:
    if not plan.told:
        yield "The workload does not say what prompts share, so nothing is known of what a cache would find."
    elif not plan.unlimited:
        yield "No two prompts begin alike: no cache finds anything."
    else:
        yield from _sizes(plan)
        yield from _loading(plan)
    yield from _machines(plan)
    yield from _simulated(plan)


def _sizes(plan: Plan) -> Iterator[str]:
    yield f"Of all prompt tokens, {plan.unlimited:.1%} can be reused: that is what a cache without limit finds."
    sure = "" if plan.error is None else f" (from a sample; at most about {plan.error:.3f} off)"
    point = plan.recommended
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
    most = [point for point in plan.set_ups if point.tier is None][-1]
    finds = f" would find {most.hit_rate:.1%} of prompt tokens and" if plan.unlimited else ""
    yield (
        f"The workload asks for {rate:,.3g} requests a second, {busiest:,.3g} at its busiest. {_having(plan, most)}"
        f"{finds} could serve {most.most_requests_per_second:,.3g} a second at most."
    )
    room = [point for point in plan.set_ups if UTILISED * point.most_requests_per_second >= busiest]
    fewest = min((point for point in room if point.tier), key=lambda point: point.replicas, default=None)
    if fewest is not None and fewest.replicas < most.replicas:
        yield f"{_having(plan, fewest)} would do, at no more than {UTILISED:.0%} of what they could serve."
    elif not room:
        yield f"None of these set-ups serves its busiest time with {1 - UTILISED:.0%} to spare."


def _simulated(plan: Plan) -> Iterator[str]:
    for point in plan.set_ups:
        found = point.simulated
        if found is not None:
            routed = f", routed by {plan.routing}" if point.replicas > 1 else ""
            yield (
                f"Simulated over {found.completed:,} of {plan.demand.requests:,} requests: {_having(plan, point)}"
                f"{routed}: {found.hit_rate:.1%} of prompt tokens found, mean time to first token "
                f"{seconds_words(found.mean_ttft)}, p99 {seconds_words(found.p99_ttft)}, queueing included."
            )


def _having(plan: Plan, point: SetUpPoint) -> str:
    replicas = "One replica" if point.replicas == 1 else f"{point.replicas:,} replicas"
    beside = f" and {size_words(point.tier_bytes)} of {tier_words(point.tier)}" if point.tier else ""
    return f"{replicas} with {size_words(plan.pool_bytes)} of KV memory{beside}{' each' if point.replicas > 1 else ''}"


def tier_words(tier: str) -> str:
    return tier.upper() if tier == "ram" else tier
