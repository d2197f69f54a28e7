"""What a gateway adds: the time to first token through it, against asking its only worker.

    python -m benchmarks.gateway [--emberkv "COMMAND"] [--rounds 20] [--streams 16] [--out PREFIX]

A round asks the worker and the gateway in turn, in an order that alternates. So many clients each ask again as soon as
they are answered. Prompts are cached, so that next to nothing is computed and what is added shows. The worker computes
on one core, unless OMP_NUM_THREADS says otherwise. Exits with 1 when the target is missed.
"""

import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from benchmarks import arguments, lib

TARGET_MS = 3.0
PROMPT = "You are a patient guide to Python's standard library. " * 20
ANSWER = 16
REQUESTS = 4
"""Of each client in a round."""
WARM_ROUNDS = 2
"""Rounds that do not count."""


@dataclass(frozen=True, slots=True)
class Spread:
    """In milliseconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        ordered = sorted(seconds)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
        return cls(1e3 * statistics.median(ordered), 1e3 * p99)

    def __str__(self) -> str:
        return f"median {self.median:.2f} ms, p99 {self.p99:.2f} ms"


async def stream(http: aiohttp.ClientSession, url: str, model: str, number: int) -> tuple[float, float]:
    """Seconds to the first token, and to the end, of one streamed chat."""
    body = {
        "model": model, "max_tokens": ANSWER, "temperature": 0, "stream": True, "ignore_eos": True,
        "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": f"Question {number}?"}],
    }  # fmt: skip
    began, first = time.perf_counter(), 0.0
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {") and not first:
                delta = json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]
                first = time.perf_counter() - began if delta.get("content") else 0.0
    return first, time.perf_counter() - began


async def client(http: aiohttp.ClientSession, url: str, model: str, number: int) -> list[tuple[float, float]]:
    """One answer after the other. The clients begin at different times, as they would."""
    await asyncio.sleep(number * 0.003)
    return [await stream(http, url, model, number) for _ in range(REQUESTS)]


async def measure(worker: str, gateway: str, *, rounds: int, streams: int) -> dict[str, dict[str, Spread]]:
    """The spread of both times, by where they were asked for."""
    urls = {"worker": worker, "gateway": gateway}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
        async with http.get(f"{worker}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        for number in range(WARM_ROUNDS + rounds):
            for name in list(urls) if number % 2 else reversed(list(urls)):
                clients = [client(http, urls[name], model, each) for each in range(streams)]
                answers = [answer for seen in await asyncio.gather(*clients) for answer in seen]
                times[name] += answers if number >= WARM_ROUNDS else []
    return {
        name: {"first token": Spread.of([first for first, _ in seen]), "whole": Spread.of([whole for _, whole in seen])}
        for name, seen in times.items()
    }


@contextlib.contextmanager
def processes(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """A worker with the demonstration model and a gateway; their URLs."""
    folder = arguments.WORK
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder / "cluster-secret"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    flags = ("--cluster-secret-file", str(secret), "--port")
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    worker = lib.Server(
        "worker", lambda port: [*command, "serve", "--worker-id", "a", *flags, str(port)], "/ready", env=threads
    )
    with lib.serving(worker, folder / "worker.log") as worker_url:
        gateway = lib.Server(
            "gateway", lambda port: [*command, "gateway", "--worker", worker_url, *flags, str(port)], "/ready"
        )
        with lib.serving(gateway, folder / "gateway.log") as gateway_url:
            yield worker_url, gateway_url


def main() -> int:
    parser = arguments.server_parser(__doc__, rounds=20)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--urls", nargs=2, metavar="URL", help="of a worker and its gateway, which run already")
    given = parser.parse_args()
    with contextlib.nullcontext(given.urls) if given.urls else processes(given.emberkv) as (worker, gateway):
        spreads = asyncio.run(measure(worker, gateway, rounds=given.rounds, streams=given.streams))
    added = spreads["gateway"]["first token"].median - spreads["worker"]["first token"].median
    lines = [f"{streams_of}: {kind}: {spread}" for streams_of, each in spreads.items() for kind, spread in each.items()]
    lines.append(f"the gateway adds {added:.2f} ms to the median time to first token (target: {TARGET_MS:g} ms)")
    print("\n".join(lines))
    if given.out is not None:
        figures = {name: {kind: vars_of(each) for kind, each in kinds.items()} for name, kinds in spreads.items()}
        Path(f"{given.out}.json").write_text(json.dumps({"streams": given.streams, "added_ms": added, **figures}))
    return int(added > TARGET_MS)


def vars_of(spread: Spread) -> dict[str, float]:
    return {"median_ms": spread.median, "p99_ms": spread.p99}


if __name__ == "__main__":
    sys.exit(main())
