"""What the benchmarks share: servers started and stopped, prompts of known length, and tables of ratios."""

import contextlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from emberkv.bench import probe
from emberkv.bench.client import Answer, Clock, Endpoint, Target, ask
from emberkv.bench.words import text
from emberkv.bench.workload import Message

STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server. argv: from the port to the command line. env: added to ours."""

    name: str
    argv: Callable[[int], list[str]]
    ready_path: str
    env: Mapping[str, str] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(server: Server, log: Path, *, ready_within: float = 600.0) -> Iterator[str]:
    """Runs ``server`` in a process group of its own and yields its URL once it is ready; then ends the whole group.

    log: takes the server's output. ready_within: seconds. Raises RuntimeError, naming the log, when the server ends
    or is not ready in time.
    """
    port = free_port()
    with log.open("a") as output:
        process = subprocess.Popen(
            server.argv(port), env=os.environ | dict(server.env), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(process, url + server.ready_path, server.name, log, time.monotonic() + ready_within)
        yield url
    finally:
        _end_group(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, name: str, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} before it was ready; see {log}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{name} was not ready in time; see {log}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the group to end, and kills what is left of it, workers that outlive their parent included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def emberkv_server(command: Sequence[str], model: Path, *flags: str) -> Server:
    return Server(
        "emberkv",
        lambda port: [*command, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags],
        "/ready",
    )


class Prompter:
    """Asks one server with prompts never asked before, of known length; any failed answer raises RuntimeError."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        target: Target,
        rng: random.Random,
        per_word: float,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.client, self.target = client, target
        self._rng, self._per_word, self._clock = rng, per_word, clock

    @classmethod
    async def connect(cls, client: httpx.AsyncClient, rng: random.Random) -> "Prompter":
        """Learns the model's name and how many tokens a word of ours is."""
        target = Target(await probe.first_model(client), Endpoint.COMPLETIONS)
        ratio = await probe.tokens_per_word(client, target, str(rng.random()), time.perf_counter)
        if ratio is None:
            raise RuntimeError(f"{client.base_url} reports no prompt tokens; lengths cannot be known")
        return cls(client, target, rng, ratio)

    def fresh(self, tokens: int) -> str:
        """New text of about ``tokens`` tokens; it starts with a space, so texts can be joined."""
        return " " + text(self._rng, round(tokens / self._per_word))

    async def ask(self, prompt: str, *, max_tokens: int = 1) -> Answer:
        message: Message = {"role": "user", "content": prompt}
        answer = await ask(self.client, self.target, [message], max_tokens=max_tokens, clock=self._clock)
        if answer.error:
            raise RuntimeError(f"{self.client.base_url}: {answer.error}")
        return answer

    async def ttft(self, prompt: str, *, cached: bool) -> float:
        """Seconds to the first of one token. cached: whether most of the prompt must, or nothing may, be cached."""
        answer = await self.ask(prompt)
        usage = answer.usage
        hit = (usage.cached_tokens or 0) if usage else 0
        length = (usage.prompt_tokens or 0) if usage else 0
        if (hit < 0.8 * length) if cached else (hit > 0):
            wanted = "at least 80%" if cached else "none"
            raise RuntimeError(f"{hit} of {length} prompt tokens were cached; this measurement needs {wanted}")
        assert answer.ttft is not None
        return answer.ttft


@dataclass(frozen=True, slots=True)
class Middle:
    """One value a round, in a nutshell."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Middle":
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row of a table: two figures taken once a round, and their ratio round by round.

    at_least: the ratio must reach the target; otherwise it must not exceed it. target: None to only show it.
    """

    name: str
    unit: str
    top_name: str
    top: Sequence[float]
    bottom_name: str
    bottom: Sequence[float]
    target: float | None = None
    at_least: bool = False

    @property
    def ratio(self) -> Middle:
        return Middle.of([a / b for a, b in zip(self.top, self.bottom, strict=True)])

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio.median >= self.target if self.at_least else self.ratio.median <= self.target

    def cells(self) -> list[str]:
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:.3g}"
        values = [
            f"{name}: {Middle.of(side)} {self.unit}"
            for name, side in ((self.top_name, self.top), (self.bottom_name, self.bottom))
        ]
        met = {True: "yes", False: "no", None: ""}[self.met]
        return [self.name, *values, str(self.ratio), target, met]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": asdict(self.ratio), "met": self.met}


def markdown(rows: Sequence[Comparison]) -> str:
    """Values are medians over rounds, with the lowest and the highest."""
    lines = [["what", "measured", "against", "ratio", "target", "met"], ["---"] * 6, *(r.cells() for r in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cpu_facts() -> dict[str, str]:
    """What Linux says of its last core; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def machine() -> dict[str, Any]:
    """What the figures were taken on. load_at_start above 0.5 means that something else was running."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def publish(rows: Sequence[Comparison], about: Mapping[str, Any], out: Path | None) -> int:
    """Prints the table and, given ``out``, writes out.json and out.md. Returns 0 when every target is met, else 1."""
    page = f"{json.dumps(dict(about), indent=1)}\n\n{markdown(rows)}"
    print(page)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = dict(about) | {"rows": [row.as_json() for row in rows]}
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(rows) + "\n")
    return 1 if any(row.met is False for row in rows) else 0
