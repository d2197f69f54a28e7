"""A cluster of two workers: what routing, a shared tier, failover and a gateway bring and cost.

    python -m benchmarks.cluster [--quick] [--only PART ...] [--rounds 3] [--out PREFIX]

Each worker computes on one core of its own, as far as there are two; client and gateway use the same cores. A random
Qwen2 of 57M parameters in bf16 is served. Parts:

routing: the same conversations, with other texts each time, with each routing policy and with the caches off.
reuse: prompts of which nothing is cached, with the caches on and off.
remote: a prompt that one worker computed, at the other one, which loads it from a Redis server.
failover: the pause in an answer whose worker is killed.
moves: the next turn of a conversation whose worker has stopped.
gateway: the time to first token through a gateway, against asking its worker.

Exits with 1 when a target is missed.
"""

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from benchmarks import arguments, gateway, lib, report
from benchmarks.figures import Comparison, Figure, Row
from benchmarks.random_qwen2 import ensure_model
from benchmarks.shared_tiers import server as redis_server

from emberkv.bench.client import Message, Target, ask
from emberkv.bench.runner import BenchWorkload, first_model, run_workload, tokens_per_word
from emberkv.bench.summary import Summary, summarize
from emberkv.cli.bench import connect

PARTS = ("routing", "reuse", "remote", "failover", "moves", "gateway")
POLICIES = ("expected-ttft", "consistent-hashing", "random", "round-robin")
OFF = "caches off"
POLL_SECONDS = 0.05
WAIT_SECONDS = 120.0
ATTEMPTS = 5
"""A load may be left out where computing looks cheaper, as before any rate was measured."""

BLOCK_TOKENS = 16
STORED = 'emberkv_tier_stores_total{tier="remote"}'
LOADED = ('emberkv_tier_load_seconds_sum{tier="remote"}', 'emberkv_tier_loads_total{tier="remote"}')

Figures = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. context: tokens of the prompts that are loaded and of the conversation that moves.

    answer: tokens of the answer whose worker is killed.
    """

    conversations: BenchWorkload
    fresh: BenchWorkload
    context: int
    answer: int
    gateway_rounds: int
    cache_ram: str = "64MiB"
    """Of a worker, so little that the first round's conversations fill it: what then grows is a leak."""


FULL = Size(
    BenchWorkload(sessions=8, turns=4, concurrency=4, system_tokens=1000, user_tokens=300, answer_tokens=32),
    BenchWorkload(sessions=12, turns=1, concurrency=4, system_tokens=0, user_tokens=1000, answer_tokens=8),
    context=4000, answer=200, gateway_rounds=20,
)  # fmt: skip
QUICK = Size(
    BenchWorkload(sessions=3, turns=2, concurrency=2, system_tokens=100, user_tokens=50, answer_tokens=4),
    BenchWorkload(sessions=2, turns=1, concurrency=2, system_tokens=0, user_tokens=100, answer_tokens=4),
    context=1000, answer=60, gateway_rounds=1,
)  # fmt: skip


class Cluster:
    """A gateway and workers that register at it, each on a core of its own. flags: of the workers."""

    def __init__(self, command: Sequence[str], model: Path, *flags: str, routing: str = POLICIES[0]) -> None:
        self.folder = arguments.WORK
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workers: dict[str, lib.Running] = {}
        self._command, self._model, self._flags = command, model, flags
        self._stack = ExitStack()
        secret = self.folder / "cluster-secret"
        if not secret.exists():
            secret.touch(mode=0o600)
            secret.write_text(secrets.token_hex(32))
        self._secret = ("--cluster-secret-file", str(secret))
        self.gateway = self._stack.enter_context(self.gateway_of(routing))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def gateway_of(self, routing: str, *urls: str) -> contextlib.AbstractContextManager[lib.Running]:
        """A gateway. urls: of workers that do not register at it."""
        named = [part for url in urls for part in ("--worker", url)]

        def argv(port: int) -> list[str]:
            return [*self._command, "gateway", "--port", str(port), "--routing", routing, *named, *self._secret]

        return lib.running(lib.Server("gateway", argv, "/ready" if named else "/health"), self.folder / "gateway.log")

    def start_worker(self, name: str, core: int, *more: str) -> lib.Running:
        flags = (*self._flags, *more, "--worker-id", name, "--gateway", self.gateway.url, *self._secret)
        pinned = [*on_core(core), *self._command]
        started = lib.emberkv_server(pinned, self._model, *flags)
        started = replace(started, env={"OMP_NUM_THREADS": "1"})
        self.workers[name] = self._stack.enter_context(lib.running(started, self.folder / f"worker-{name}.log"))
        return self.workers[name]

    async def until(self, statuses: dict[str, str]) -> None:
        """Wait until the gateway sees each of these workers so, or does not list it, if that is ``gone``."""

        async def seen() -> bool:
            listed = {each["worker_id"]: each["status"] for each in await workers_of(self.gateway.url)}
            return all(listed.get(name, "gone") == status for name, status in statuses.items())

        await eventually(seen)


def on_core(core: int) -> list[str]:
    """The beginning of a command line that has a process compute on one core; nothing where that cannot be."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    taskset = shutil.which("taskset")
    return [taskset, "-c", str(cores[core % len(cores)])] if taskset and len(cores) > 1 else []


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not await condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"what the benchmark waits for has not come in {WAIT_SECONDS:g} s")
        await asyncio.sleep(POLL_SECONDS)


async def workers_of(url: str) -> list[dict[str, Any]]:
    """What a gateway says of its workers."""
    async with httpx.AsyncClient(timeout=60) as http:
        found: list[dict[str, Any]] = (await http.get(f"{url}/v1/cluster")).json()["workers"]
        return found


async def metric(url: str, name: str) -> float:
    """A server's metric, summed over its labels but for those in ``name``."""
    async with httpx.AsyncClient(timeout=60) as http:
        lines = (await http.get(f"{url}/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.asynccontextmanager
async def prompter(url: str, rng: random.Random) -> AsyncIterator[lib.Prompter]:
    async with connect(url, None, timeout=600) as client:
        yield await lib.Prompter.connect(client, rng)


async def converse(url: str, workload: BenchWorkload) -> Summary:
    """Play a workload with texts that nothing has seen; every request must succeed."""
    async with connect(url, None, timeout=600) as client:
        target, nonce = Target(await first_model(client)), secrets.token_hex(8)
        ratio = await tokens_per_word(client, target, nonce, time.perf_counter)
        drawn = replace(workload, nonce=nonce, tokens_per_word=ratio or 1.0)
        found = summarize(await run_workload(client, target, drawn, time.perf_counter))
    if found.failed or found.not_sent:
        raise RuntimeError(f"{url}: {found.failed + found.not_sent} of {found.requests} requests failed")
    return found


def median_ttft(found: Summary) -> float:
    """Over all requests, of any phase."""
    medians = [(each.p50, each.n) for each in found.ttft.values() if each is not None]
    return statistics.median([p50 for p50, count in medians for _ in range(count)])


async def converse_through(cluster: Cluster, policy: str, urls: Sequence[str], size: Size, figures: Figures) -> None:
    """One run of the conversations, through a gateway of their own, so that it counts only theirs."""
    with cluster.gateway_of(POLICIES[0] if policy == OFF else policy, *urls) as through:

        async def all_up() -> bool:
            return [each["status"] for each in await workers_of(through.url)] == ["up"] * len(urls)

        await eventually(all_up)
        found = await converse(through.url, size.conversations)
        requests = [each["requests"] for each in await workers_of(through.url)]
    print(f"{policy}: {found.requests} requests in {found.total:.1f} s", file=sys.stderr, flush=True)
    figures[f"{policy}: TTFT"].append(median_ttft(found))
    figures[f"{policy}: total"].append(found.total)
    figures[f"{policy}: cached"].append(found.cached_share or 0.0)
    figures[f"{policy}: balance"].append(max(requests) / sum(requests) * len(requests))


def resident_mib(workers: Sequence[lib.Running]) -> float:
    """Of the worker that has most."""
    processes = [psutil.Process(each.pid) for each in workers]
    sums = [sum(p.memory_info().rss for p in (each, *each.children(recursive=True))) for each in processes]
    return max(sums) / 2**20


async def routing_rounds(given: Any, size: Size, only: Sequence[str], figures: Figures) -> None:
    """Conversations and fresh prompts over two workers with caches and two without, which idle meanwhile."""
    flags = ("--cache-ram", size.cache_ram, "--dtype", "bfloat16", "--no-warmup")
    with Cluster(given.emberkv, given.model, *flags) as cluster:
        cached = [cluster.start_worker(name, core) for core, name in enumerate("ab")]
        uncached = [cluster.start_worker(name, core, "--no-prefix-cache") for core, name in enumerate("cd")]
        urls = {policy: [each.url for each in cached] for policy in POLICIES}
        urls[OFF] = [each.url for each in uncached]
        for number in range(given.rounds):
            order = list(urls)[:: 1 if number % 2 else -1]
            if "routing" in only:
                for policy in order:
                    await converse_through(cluster, policy, urls[policy], size, figures)
                figures["resident"].append(resident_mib(cached))
            if "reuse" in only:
                for on, name in [(cached, "on"), (uncached, "off")][:: 1 if number % 2 else -1]:
                    found = await asyncio.gather(*(converse(each.url, size.fresh) for each in on))
                    figures[f"fresh, caches {name}"].append(max(each.total for each in found))


async def remote_round(cluster: Cluster, size: Size, figures: Figures, rng: random.Random) -> None:
    """What worker a has computed, at worker b."""
    a, b = cluster.workers["a"], cluster.workers["b"]
    async with prompter(a.url, rng) as first, prompter(b.url, rng) as second:
        figures["remote: computed"].append(await second.ttft(second.fresh(size.context), cached=False))
        for attempt in range(ATTEMPTS):
            prompt = first.fresh(size.context)
            await computed_and_stored(first, [a.url], prompt)
            before = [await metric(b.url, name) for name in LOADED]
            answer = await second.ask(prompt + second.fresh(32))
            found = (answer.usage and answer.usage.cached_tokens) or 0
            if found > size.context / 2:
                break
            if attempt == ATTEMPTS - 1:
                raise RuntimeError(f"{b.url} computed {ATTEMPTS} prompts that the remote tier had")
        seconds, blocks = [
            now - then for now, then in zip([await metric(b.url, n) for n in LOADED], before, strict=True)
        ]
    load = next(each["load"] for each in await workers_of(cluster.gateway.url) if each["worker_id"] == "b")
    assert answer.ttft is not None
    figures["remote: loaded"].append(answer.ttft)
    figures["remote: rate"].append(blocks * load["block_bytes"] / max(seconds, 1e-9) / 1e6)


async def computed_and_stored(asked: lib.Prompter, urls: Sequence[str], prompt: str) -> None:
    """Have one of the workers compute a prompt, and wait until the remote tier has all of it."""

    async def stores() -> float:
        return sum([await metric(url, STORED) for url in urls])

    before = await stores()
    usage = (await asked.ask(prompt)).usage
    blocks = (usage.prompt_tokens or 0) // BLOCK_TOKENS if usage else 0

    async def stored() -> bool:
        return await stores() - before >= blocks

    await eventually(stored)


async def failover_round(cluster: Cluster, size: Size, figures: Figures, rng: random.Random) -> str:
    """Kill the worker that answers, when its answer has begun. Returns its name."""
    began = asyncio.Event()
    async with prompter(cluster.gateway.url, rng) as asked:
        message: Message = {"role": "user", "content": asked.fresh(size.context // 4)}
        answering = asyncio.create_task(
            ask(asked.client, asked.target, [message], max_tokens=size.answer, clock=time.perf_counter,
                on_text=began.set)
        )  # fmt: skip
        await began.wait()
        name = next(each["worker_id"] for each in await workers_of(cluster.gateway.url) if each["running"])
        os.killpg(cluster.workers[name].pid, signal.SIGKILL)
        answer = await answering
    if answer.error or answer.output_tokens != size.answer:
        raise RuntimeError(f"the answer has {answer.output_tokens} of {size.answer} tokens; {answer.error}")
    figures["failover: pause"].append(max(answer.gaps))
    figures["failover: gap"].append(statistics.median(answer.gaps))
    return name


async def move_round(cluster: Cluster, size: Size, figures: Figures, rng: random.Random) -> None:
    """Stop the worker that a conversation is at, and ask its next turn, which the other one answers."""
    async with prompter(cluster.gateway.url, rng) as asked:
        before = {each["worker_id"]: each["requests"] for each in await workers_of(cluster.gateway.url)}
        urls = [each.url for each in cluster.workers.values()]
        prompt = asked.fresh(size.context)
        await computed_and_stored(asked, urls, prompt)
        listed = await workers_of(cluster.gateway.url)
        name = next(each["worker_id"] for each in listed if each["requests"] > before[each["worker_id"]])
        os.kill(cluster.workers.pop(name).pid, signal.SIGTERM)
        await cluster.until({name: "gone"})
        figures["moves: cold"].append(await asked.ttft(asked.fresh(size.context + 32), cached=False))
        figures["moves: moved"].append(await asked.ttft(prompt + asked.fresh(32), cached=True))


async def shared_rounds(given: Any, size: Size, only: Sequence[str], figures: Figures, redis: str) -> None:
    """Rounds with a cluster of their own, whose workers share a Redis server."""
    flags = ("--cache-ram", size.cache_ram, "--dtype", "bfloat16", "--no-warmup", "--remote-tier", redis)
    for number in range(given.rounds):
        rng = random.Random(secrets.token_hex(8))
        with Cluster(given.emberkv, given.model, *flags) as cluster:
            for core, name in enumerate("ab"):
                cluster.start_worker(name, core)
            await cluster.until({"a": "up", "b": "up"})
            if "remote" in only:
                await remote_round(cluster, size, figures, rng)
            if "failover" in only:
                killed = await failover_round(cluster, size, figures, rng)
                del cluster.workers[killed]
                cluster.start_worker("c", "ab".index(killed))
                await cluster.until({"c": "up", killed: "down"})
            if "moves" in only:
                await move_round(cluster, size, figures, rng)
        print(f"round {number + 1}: {dict(figures)}", file=sys.stderr, flush=True)


def routing_rows(figures: Figures) -> Iterator[Row]:
    ours = POLICIES[0]
    for policy in (*POLICIES, OFF):
        yield Figure(f"conversations, {policy}: share of prompt tokens cached", "", figures[f"{policy}: cached"])
        yield Figure(f"conversations, {policy}: requests of the busier worker", "of the mean",
                     figures[f"{policy}: balance"])  # fmt: skip
    for policy in (*POLICIES[1:], OFF):
        for kind in ("TTFT", "total"):
            target = 1.0 if policy == OFF else None
            yield Comparison(f"conversations: {kind}", "s", ours, figures[f"{ours}: {kind}"], policy,
                             figures[f"{policy}: {kind}"], target)  # fmt: skip
    yield Figure("resident memory of the larger worker, last round", "MiB", figures["resident"][-1:])
    yield Figure("the same, against the first round", "", [figures["resident"][-1] / figures["resident"][0]], 1.1)


def shared_rows(figures: Figures, size: Size, only: Sequence[str]) -> Iterator[Row]:
    tokens = f"{size.context:,} tokens"
    if "remote" in only:
        yield Comparison(f"TTFT of {tokens} that the other worker computed, by the remote tier", "s", "loaded",
                         figures["remote: loaded"], "computed", figures["remote: computed"], 1.0)  # fmt: skip
        yield Figure("remote tier, verified loads", "MB/s", figures["remote: rate"])
    if "failover" in only:
        yield Figure(f"pause in an answer of {size.answer} tokens whose worker is killed", "s",
                     figures["failover: pause"])  # fmt: skip
        yield Figure("the same answer's usual gap between tokens", "s", figures["failover: gap"])
    if "moves" in only:
        yield Comparison(f"TTFT of a conversation of {tokens} that moves", "s", "moved", figures["moves: moved"],
                         "cold", figures["moves: cold"], 1 / 3)  # fmt: skip


def gateway_rows(given: Any, size: Size) -> list[Row]:
    with gateway.processes(given.emberkv) as (worker, through):
        spreads = asyncio.run(gateway.measure(worker, through, rounds=size.gateway_rounds, streams=16))
    first = {name: each["first token"] for name, each in spreads.items()}
    added = first["gateway"].median - first["worker"].median
    rows: list[Row] = [Figure("16 streams, TTFT: a gateway adds to the median", "ms", [added], gateway.TARGET_MS)]
    for name, each in first.items():
        rows += [Figure(f"16 streams, TTFT at the {name}, {kind}", "ms", [value])
                 for kind, value in (("median", each.median), ("p99", each.p99))]  # fmt: skip
    return rows


def rows_of(given: Any, size: Size, only: Sequence[str]) -> list[Row]:
    figures: Figures = defaultdict(list)
    rows: list[Row] = []
    if {"routing", "reuse"} & set(only):
        asyncio.run(routing_rounds(given, size, only, figures))
        rows += routing_rows(figures) if "routing" in only else ()
        if "reuse" in only:
            on, off = figures["fresh, caches on"], figures["fresh, caches off"]
            rows.append(Comparison("prompts without reuse: total", "s", "caches on", on, "caches off", off, 1.03))
    if {"remote", "failover", "moves"} & set(only):
        if program := shutil.which("redis-server") or shutil.which("valkey-server"):
            with redis_server(program) as address:
                asyncio.run(shared_rounds(given, size, only, figures, address.url))
            rows += shared_rows(figures, size, only)
        else:
            print("remote, failover and moves need redis-server or valkey-server", file=sys.stderr)
    if "gateway" in only:
        rows += gateway_rows(given, size)
    return rows


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, default=arguments.WORK / "random-qwen2", help="written there if missing")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=PARTS, help="some of the parts")
    parser.add_argument("--quick", action="store_true", help="little of everything, one round")
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all it has started ends, too
    about = report.about("benchmarks.cluster", __doc__, rounds=given.rounds, parts=list(given.only))
    ensure_model(given.model)
    return report.publish(rows_of(given, QUICK if given.quick else FULL, given.only), about, given.out)


if __name__ == "__main__":
    sys.exit(main())
