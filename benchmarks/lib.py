"""What the benchmarks share: servers started and stopped, and prompts of known length."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from emberkv.bench.client import Clock, Endpoint, Message, Target, TimedAnswer, ask
from emberkv.bench.runner import first_model, text, tokens_per_word

STOP_SECONDS = 30.0
UNCACHED = 4  # tokens


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server. argv: from the port to the command line. env: added to ours."""

    name: str
    argv: Callable[[int], list[str]]
    ready_path: str
    env: Mapping[str, str] = field(default_factory=dict)


def free_port() -> int:
    """Below the ports of outgoing connections: one of these could be taken before the server listens."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready. pid: of its process, which leads a process group."""

    url: str
    pid: int


@contextlib.contextmanager
def running(server: Server, log: Path, *, ready_within: float = 600.0) -> Iterator[Running]:
    """Runs ``server`` in a process group of its own, yields once it is ready, and then ends the whole group.

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
        yield Running(url, process.pid)
    finally:
        _end_group(process)


@contextlib.contextmanager
def serving(server: Server, log: Path) -> Iterator[str]:
    """Like `running`, where only the URL is needed."""
    with running(server, log) as started:
        yield started.url


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
        target = Target(await first_model(client), Endpoint.COMPLETIONS)
        ratio = await tokens_per_word(client, target, str(rng.random()), time.perf_counter)
        if ratio is None:
            raise RuntimeError(f"{client.base_url} reports no prompt tokens; lengths cannot be known")
        return cls(client, target, rng, ratio)

    def fresh(self, tokens: int) -> str:
        """New text of about ``tokens`` tokens; it starts with a space, so texts can be joined."""
        return " " + text(self._rng, round(tokens / self._per_word))

    async def ask(self, prompt: str, *, max_tokens: int = 1) -> TimedAnswer:
        message: Message = {"role": "user", "content": prompt}
        answer = await ask(self.client, self.target, [message], max_tokens=max_tokens, clock=self._clock)
        if answer.error:
            raise RuntimeError(f"{self.client.base_url}: {answer.error}")
        return answer

    async def ttft(self, prompt: str, *, cached: bool) -> float:
        """Seconds to the first of one token. cached: whether most of the prompt must be cached, or next to nothing may.

        Two prompts of random words may begin with the same word, whose token a partial block then has.
        """
        answer = await self.ask(prompt)
        usage = answer.usage
        hit = (usage.cached_tokens or 0) if usage else 0
        length = (usage.prompt_tokens or 0) if usage else 0
        if (hit < 0.8 * length) if cached else (hit > UNCACHED):
            wanted = "at least 80%" if cached else f"at most {UNCACHED}"
            raise RuntimeError(f"{hit} of {length} prompt tokens were cached; this measurement needs {wanted}")
        assert answer.ttft is not None
        return answer.ttft
