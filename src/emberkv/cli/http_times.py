"""Times of a real server, seen by a client on the same machine: what HTTP, JSON and tokenizing add to the engine's."""

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from emberkv.bench.client import Answer, Target, ask
from emberkv.bench.workload import Workload
from emberkv.config import ServeConfig
from emberkv.errors import EmberError
from emberkv.sim.roofline import Chunk, Roofline, Work

NAME = "calibrated"
READY_SECONDS = 600.0
ROUNDS = 3
STREAMS = (1, 2, 4, 8)
STREAM_WORDS = (30, 300, 1200)
STREAM_TOKENS = 40
REQUEST_WORDS = (20, 60, 120)


@contextmanager
def served(config: ServeConfig, log: Path) -> Iterator[str]:
    """The URL of a server process with these settings; it ends with the context. log: takes what the server prints.

    Raises EmberError, with the log's last lines, when it does not become ready.
    """
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    model = [] if config.model is None else [config.model]
    flags = {
        "--port": port, "--served-name": NAME, "--dtype": config.dtype, "--device": config.device,
        "--block-size": config.block_size, "--prefill-chunk": config.prefill_chunk,
        "--cache-ram": int(config.cache_ram or 0) or None,
    }  # fmt: skip
    told = [str(part) for name, value in flags.items() if value is not None for part in (name, value)]
    command = [sys.executable, "-m", "emberkv.cli.main", "serve", *model, *told, "--no-warmup"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBERKV_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)  # noqa: S603 - our own command
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)  # it does not listen yet
    raise EmberError(f"the server to measure did not become ready: {log.read_text(errors='replace')[-500:].strip()}")


def decode_times(url: str) -> list[tuple[Work, float]]:
    """Decode steps by streams and context, each with the median of its seconds over `ROUNDS`."""
    return asyncio.run(_decode_times(url))


def request_seconds(url: str, roofline: Roofline) -> float:
    """From sending a request to its first text, less what ``roofline`` expects of its prefill; the mean."""
    return asyncio.run(_request_seconds(url, roofline))


async def _decode_times(url: str) -> list[tuple[Work, float]]:
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for words in STREAM_WORDS:
            for streams in STREAMS:
                rounds = [await _decode(client, streams, words, f"{words} {streams} {each}") for each in range(ROUNDS)]
                found.append((rounds[0][0], statistics.median(seconds for _, seconds in rounds)))
    return found


async def _decode(client: httpx.AsyncClient, streams: int, words: int, nonce: str) -> tuple[Work, float]:
    script = Workload(sessions=streams, user_tokens=words, nonce=f"calibrate {nonce}")
    await _together(client, script, streams, 1)  # cached then, so that the streams begin together
    answers = await _together(client, script, streams, STREAM_TOKENS)
    context = sum((each.usage.prompt_tokens or 0) + STREAM_TOKENS // 2 for each in answers if each.usage is not None)
    each_token = [(each.piece_times[-1] - each.piece_times[0]) / (STREAM_TOKENS - 1) for each in answers]
    return Work(streams, context), statistics.median(each_token)


async def _together(client: httpx.AsyncClient, script: Workload, streams: int, tokens: int) -> Sequence[Answer]:
    return await asyncio.gather(*(_ask(client, script, stream, tokens) for stream in range(streams)))


async def _ask(client: httpx.AsyncClient, script: Workload, session: int, tokens: int) -> Answer:
    question = script.question(session, 0)
    answer = await ask(client, Target(NAME), [question], max_tokens=tokens, clock=time.perf_counter)
    if answer.error or answer.usage is None or not answer.piece_times:
        raise EmberError(f"a request to measure by failed: {answer.error or 'it came without text or usage'}")
    return answer


async def _request_seconds(url: str, roofline: Roofline) -> float:
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for number in range(4 * ROUNDS):
            for words in REQUEST_WORDS:
                found.append(await _beside_steps(client, roofline, words, f"{number}"))
                background = asyncio.create_task(_stream(client, f"background {number} {words}"))
                await asyncio.sleep(BACKGROUND_SECONDS)
                found.append(await _beside_steps(client, roofline, words, f"{number} busy", await_stream=background))
    return max(0.0, statistics.fmean(found))
