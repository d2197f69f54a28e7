"""The HTML report of a plan: one page that opens with the set-up to get."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from emberkv.sim import page
from emberkv.sim.formatting import format_count, format_rate, format_seconds, format_share, format_size, format_tier
from emberkv.sim.hardware import GIB
from emberkv.sim.page import Axis, PlotLine, line_plot, named_bars
from emberkv.sim.plan import Plan, SetUpPoint, format_price, get_this, recommendation


def render_plan(plan: Plan, name: str, *, made: datetime | None = None) -> str:
    """name: of the workload. Equal plans give equal text, apart from ``made``, the time at its end."""
    return page.page(f"What to get for {name}", _parts(plan, made))


def _parts(plan: Plan, made: datetime | None) -> Iterator[str]:
    answer, *reasons = get_this(plan)
    yield page.paragraph(answer, f"verdict {'bad' if plan.get is None else 'good'}")
    for sentence in reasons:
        yield page.paragraph(sentence)
    yield page.cards(_cards(plan))
    yield page.gallery(_figures(plan))
    yield page.section("What is known", (page.paragraph(sentence) for sentence in recommendation(plan)))
    yield page.section("Set-ups", [_set_ups(plan)])
    if plan.unlimited:
        yield page.section("Cache sizes", [_sizes(plan)])
    about = f"One replica: {plan.about.machine_text}, {plan.about.memory_text}. {plan.about.defaults_sentence or ''}"
    yield page.paragraph(about.strip(), "about")
    yield page.paragraph(page.made_at(plan.about.version, made), "about")


def _cards(plan: Plan) -> Iterator[tuple[str, str, str]]:
    point = plan.get
    if point is not None:
        devices = point.replicas * plan.about.devices
        yield "Get", format_count(point.replicas, "replica"), f"{devices} x {plan.about.hardware or 'machine'}"
        price = format_price(plan, point)
        if price is not None:
            yield "Price", price.removesuffix(" an hour"), "an hour"
        if point.simulated is not None:
            found = point.simulated
            yield "Hit rate", format_share(found.hit_rate), f"of prompt tokens; {format_share(plan.unlimited)} at best"
            yield "Time to first token", format_seconds(found.mean_ttft), f"mean; p99 {format_seconds(found.p99_ttft)}"
    if plan.demand.busiest is not None and plan.demand.rate is not None:
        yield (
            "Load",
            f"{format_rate(plan.demand.rate)}/s",
            f"requests; {format_rate(plan.demand.busiest)} at its busiest",
        )


def _figures(plan: Plan) -> Iterator[tuple[str, str, str | None]]:
    if plan.unlimited:
        yield _by_size(plan)
    ran = [point for point in plan.set_ups if point.simulated is not None]
    if ran:
        yield _first_tokens(ran)


def _by_size(plan: Plan) -> tuple[str, str, str]:
    sizes = [point.bytes / GIB for point in plan.sizes]
    lines = [
        PlotLine(plan.eviction.upper(), sizes, [point.hit_rate for point in plan.sizes]),
        PlotLine("best possible", sizes, [point.best_possible for point in plan.sizes]),
        PlotLine("unlimited", [sizes[0], sizes[-1]], [plan.unlimited, plan.unlimited]),
    ]
    marks = {"one replica": plan.pool_bytes / GIB}
    words = f"One cache of each size finds this share of prompt tokens; a replica has {format_size(plan.pool_bytes)}"
    if plan.recommended_size is not None:
        point = plan.recommended_size
        marks[f"{plan.wanted:.0%} of what is reusable"] = point.bytes / GIB
        words += f", and {format_size(point.bytes)} capture {plan.wanted:.0%} of what is reusable"
    axes = Axis("cache size, GiB", log=True), Axis("share of prompt tokens", share=True, start=0)
    return "Hit rate by cache size", f"{words}.", line_plot("sizes", words, *axes, lines, marks)


def _name(point: SetUpPoint) -> str:
    if point.tier is None:
        return f"{point.replicas}"
    return f"{point.replicas}, {format_size(point.tier_bytes)} {format_tier(point.tier)}"


def _first_tokens(ran: Sequence[SetUpPoint]) -> tuple[str, str, str]:
    bars: dict[str, list[float]] = {"mean": [], "p99": []}
    for point in ran:
        assert point.simulated is not None
        bars["mean"].append(point.simulated.mean_ttft)
        bars["p99"].append(point.simulated.p99_ttft)
    words = "Seconds to the first token by replicas and what each has below its pool, queueing included, simulated"
    svg = named_bars("first", words, Axis("seconds", start=0), [_name(point) for point in ran], bars)
    return "Time to first token by set-up", f"{words}.", svg


def _set_ups(plan: Plan) -> str:
    rows, chosen = [], None
    for number, point in enumerate(plan.set_ups):
        if point == plan.get:
            chosen = number
        rows.append((_name(point), _cells(plan, point)))
    columns = ["replicas and tier", "hit rate", "TTFT mean", "TTFT p99", "served a second", "an hour"]
    return page.table(rows, caption="Simulated, or by formula where p99 is missing", columns=columns, chosen=chosen)


def _cells(plan: Plan, point: SetUpPoint) -> list[str]:
    price, ran = (format_price(plan, point) or "").removesuffix(" an hour"), point.simulated
    if ran is None:
        most = f"{format_rate(point.most_requests_per_second)} at most"
        return [format_share(point.hit_rate), format_seconds(point.first_token), "", most, price]
    served = ran.load.served_per_second if ran.load else ran.requests_per_second
    times = [format_seconds(ran.mean_ttft), format_seconds(ran.p99_ttft)]
    return [format_share(ran.hit_rate), *times, format_rate(served), price]


def _sizes(plan: Plan) -> str:
    rows = [
        (
            format_size(point.bytes),
            [
                f"{point.blocks:,}", format_share(point.hit_rate), format_share(point.best_possible),
                format_share(point.hit_rate / plan.unlimited),
            ],
        )
        for point in plan.sizes
    ]  # fmt: skip
    columns = ["size", f"blocks of {plan.block_size}", plan.eviction, "best possible", "of what is reusable"]
    chosen = None if plan.recommended_size is None else plan.sizes.index(plan.recommended_size)
    return page.table(rows, columns=columns, chosen=chosen)
