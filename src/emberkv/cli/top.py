"""``emberkv top``: what a server or a gateway does now, in a terminal."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ByteSize
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emberkv.cli.command import printable
from emberkv.cli.connection import LOCAL_URL, AdminKey, ServerError, ServerUrl, connection, reaching

SHOWN_ROWS = 6
"""Of sessions, and of prefixes."""
BAR_COLUMNS = 20

_COLOURS = {"pool": "green", "ram": "cyan", "disk": "blue", "shared": "magenta", "remote": "magenta"}


@dataclass(frozen=True)
class Scrape:
    """What a server said of itself at one moment. at: seconds of a monotonic clock.

    samples: of its metrics, by name: each with its labels. sessions, prefixes: as its routes list them; empty where
    these are closed to the caller.
    """

    at: float
    samples: Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
    sessions: Sequence[Mapping[str, Any]] = ()
    prefixes: Sequence[Mapping[str, Any]] = ()
    closed: str = ""

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        return sum(value for found, value in self.samples.get(name, ()) if labels.items() <= found.items())

    def by(self, label: str, name: str) -> dict[str, float]:
        """The samples' sums by the value of a label."""
        sums: dict[str, float] = {}
        for found, value in self.samples.get(name, ()):
            sums[found.get(label, "")] = sums.get(found.get(label, ""), 0.0) + value
        return sums


@dataclass(frozen=True, slots=True)
class Interval:
    """Two readings of one server. Where there is no earlier one, all is since the server's start."""

    now: Scrape
    before: Scrape | None = None
    _none: Scrape = field(default=Scrape(0.0, {}))

    @property
    def seconds(self) -> float | None:
        return None if self.before is None else max(self.now.at - self.before.at, 1e-9)

    def gained(self, name: str, **labels: str) -> float:
        """What a counter has gained; a server that has started anew counts from nothing."""
        now = self.now.total(name, **labels)
        before = (self.before or self._none).total(name, **labels)
        return now - before if now >= before else now

    def rate(self, name: str, **labels: str) -> float | None:
        """A second; None without an earlier reading."""
        return None if self.seconds is None else self.gained(name, **labels) / self.seconds

    def quantile(self, name: str, share: float) -> float | None:
        """The upper bound of the bucket of histogram ``name`` in which this share of the new observations ends."""
        counts = [
            (float(bound), self.gained(f"{name}_bucket", le=bound)) for bound in self.now.by("le", f"{name}_bucket")
        ]
        counts.sort()
        if not counts or counts[-1][1] <= 0:
            return None
        return next(bound for bound, count in counts if count >= share * counts[-1][1])


def top(
    server: Annotated[str | None, typer.Argument(metavar="URL", help="The same as --url.")] = None,
    *,
    url: ServerUrl = LOCAL_URL,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings.")] = 2.0,
    key: AdminKey = None,
    once: Annotated[bool, typer.Option("--once", help="Print one reading, since the start, and end.")] = False,
) -> None:
    """Show what a server or a gateway does now: load, where prompts' tokens come from, memory, sessions, prefixes."""
    url = url if server is None else server
    with httpx.Client(**connection(url, key), timeout=10.0) as client:
        console, before = Console(), read(client, time.monotonic())
        if once:
            console.print(view(Interval(before), url))
            return
        with Live(view(Interval(before), url), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now = read(client, time.monotonic())
                live.update(view(Interval(now, before), url), refresh=True)
                before = now


def read(client: httpx.Client, at: float) -> Scrape:
    """Ask the server. Raises ServerError where it does not answer, or may not be asked."""
    with reaching(client):
        metrics = client.get("/metrics")
        sessions, prefixes = client.get("/v1/cache/sessions"), client.get("/v1/cache/prefixes")
    if metrics.status_code != httpx.codes.OK:
        raise ServerError(f"{client.base_url} refuses /metrics with status {metrics.status_code}; give --key")
    samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    is_closed = sessions.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
    closed = "sessions and prefixes are for the operator: give --key" if is_closed else ""
    return Scrape(at, samples, _data(sessions), _data(prefixes), closed)


def _data(response: httpx.Response) -> Sequence[Mapping[str, Any]]:
    return response.json()["data"] if response.status_code == httpx.codes.OK else ()


def view(interval: Interval, url: str) -> RenderableType:
    """What the terminal shows, for 80 columns or more."""
    parts: list[RenderableType] = [_head(interval, url), _speed(interval), Text(), _sources(interval), Text()]
    parts.append(_memory(interval.now))
    workers = _workers(interval)
    if workers is not None:
        parts += [Text(), workers]
    parts += [Text(interval.now.closed, "dim")] if interval.now.closed else []
    if interval.now.sessions:
        parts += [Text(), _sessions(interval.now.sessions)]
    if interval.now.prefixes:
        parts += [Text(), _prefixes(interval.now.prefixes)]
    return Group(*parts)


def _head(interval: Interval, url: str) -> Text:
    build = interval.now.samples.get("emberkv_build_info", [({}, 1.0)])[0][0]
    running, waiting = interval.now.total("emberkv_requests_running"), interval.now.total("emberkv_requests_waiting")
    return Text.assemble(
        (f"{build.get('model', 'emberkv')} ", "bold"), f"at {url}: ", (f"{running:.0f} running", "bold"),
        f", {waiting:.0f} waiting",
    )  # fmt: skip


def _speed(interval: Interval) -> Text:
    span = "since the start" if interval.seconds is None else f"in the last {interval.seconds:.0f} s"
    rates = [
        (interval.rate("emberkv_requests_finished_total"), "requests/s"),
        (interval.rate("emberkv_prefix_cache_query_tokens_total"), "prompt tokens/s"),
        (interval.rate("emberkv_decode_tokens_total"), "answer tokens/s"),
    ]
    shown = ", ".join(f"{rate:,.1f} {unit}" for rate, unit in rates if rate is not None)
    first = [
        f"{name} <= {_seconds(interval.quantile('emberkv_time_to_first_token_seconds', share))}"
        for name, share in (("p50", 0.5), ("p90", 0.9))
    ]
    return Text(f"{shown}{'; ' if shown else ''}first token {span}: {', '.join(first)}")


def _sources(interval: Interval) -> Table:
    """Where prompts' tokens came from."""
    table = _table("prompt tokens from", "now", "", "since the start", "tokens")
    name = "emberkv_tier_reused_tokens_total"
    tiers = list(interval.now.by("tier", name))
    gained = {tier: interval.gained(name, tier=tier) for tier in tiers}
    totals = interval.now.by("tier", name)
    if interval.now.total("emberkv_worker_prompt_tokens_total"):
        tiers.append("foreign")  # cached at workers that do not say in which tier
    for sums, read in ((gained, interval.gained), (totals, interval.now.total)):
        if "foreign" in tiers:
            sums["foreign"] = read("emberkv_worker_cached_tokens_total")
        asked = read("emberkv_prefix_cache_query_tokens_total") + read("emberkv_worker_prompt_tokens_total")
        sums["computed"] = max(0.0, asked - sum(sums.values()))
    new, all_tokens = sum(gained.values()), sum(totals.values())
    for tier in (*tiers, "computed"):
        share = gained[tier] / new if new else 0.0
        bar = Text("█" * round(share * BAR_COLUMNS), _COLOURS.get(tier, "yellow"))
        whole = f"{totals[tier] / all_tokens:.0%}" if all_tokens else "-"
        table.add_row(tier, f"{share:.0%}" if new else "-", bar, whole, f"{totals[tier]:,.0f}")
    return table


def _memory(now: Scrape) -> Table:
    table = _table("memory", "held", "of", "")
    pool = now.by("state", "emberkv_pool_bytes")
    rows = [("pool", pool.get("in_use", 0.0) + pool.get("cached", 0.0), sum(pool.values()))] if pool else []
    most = now.by("tier", "emberkv_tier_max_bytes")
    rows += [(tier, held, most.get(tier, 0.0)) for tier, held in now.by("tier", "emberkv_tier_bytes").items()]
    for name, held, limit in rows:
        share = held / limit if limit else 0.0
        table.add_row(name, _bytes(held), _bytes(limit), Text("█" * round(share * BAR_COLUMNS), _COLOURS.get(name, "")))
    return table


def _workers(interval: Interval) -> Table | None:
    """A gateway's; None of a server."""
    statuses = {
        labels["worker"]: labels["status"]
        for labels, value in interval.now.samples.get("emberkv_worker_status", ())
        if value
    }
    if not statuses:
        return None
    table = _table("worker", "status", "index", "heard", "running", "requests", "now", numbers_from=3)
    exact = interval.now.by("worker", "emberkv_worker_index_exact")
    foreign = interval.now.by("worker", "emberkv_worker_foreign")
    silent = interval.now.by("worker", "emberkv_worker_silent_seconds")
    running = interval.now.by("worker", "emberkv_worker_running")
    requests = interval.now.by("worker", "emberkv_worker_requests_total")
    for worker in sorted(statuses):
        rate = interval.rate("emberkv_worker_requests_total", worker=worker)
        table.add_row(
            _cut(worker, 24),
            Text(statuses[worker], "green" if statuses[worker] == "up" else "red"),
            "exact" if exact.get(worker) else "approximate" if foreign.get(worker) else "degraded",
            f"{silent[worker]:.1f} s ago" if worker in silent else "-",
            f"{running.get(worker, 0):,.0f}",
            f"{requests.get(worker, 0):,.0f}",
            "-" if rate is None else f"{rate:.1f}/s",
        )
    return table


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("session", "tenant", "requests", "prompt tokens", "cached", numbers_from=2)
    for each in sessions[:SHOWN_ROWS]:
        share = each["hit_tokens"] / each["prompt_tokens"] if each["prompt_tokens"] else 0.0
        table.add_row(
            _cut(each["session"], 24), _cut(each["tenant"], 14) or "-", f"{each['requests']:,}",
            f"{each['prompt_tokens']:,}", f"{share:.0%}",
        )  # fmt: skip
    return table


def _prefixes(prefixes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("hottest prefix begins", "tokens", "hits", numbers_from=1)
    for each in prefixes[:SHOWN_ROWS]:
        begins = _cut(" ".join(each["begins"].split()), 56)
        table.add_row(begins, f"{each['tokens']:,}", f"{each['hits']:,}")
    return table


def _table(*columns: str, numbers_from: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        left = index < numbers_from or not column
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _cut(text: str, columns: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= columns else f"{shown[: columns - 1]}…"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"


def _bytes(count: float) -> str:
    return ByteSize(count).human_readable()
