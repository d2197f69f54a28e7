"""What a request costs beside its steps: HTTP, JSON, the chat template, tokenizing, and the way back."""

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from emberkv.bench.client import Target, ask
from emberkv.bench.workload import Workload
from emberkv.engine.request import Engine
from emberkv.engine.tokenizer import Tokenizer
from emberkv.errors import EmberError
from emberkv.serving.app import create_app
from emberkv.serving.context import ServingSettings
from emberkv.serving.lifecycle import Lifecycle, LoadedModel
from emberkv.serving.server import HttpServer, bind_socket
from emberkv.sim.roofline import Chunk, Roofline, Work

NAME = "calibrated"
WORDS = (20, 60, 120)
ROUNDS = 5


def http_overhead(engine: Engine, tokenizer: Tokenizer, roofline: Roofline) -> float:
    """Seconds from sending a chat request to its first text, less those of its prefill; the median of several.

    Serves the engine, which must be running and idle, on a free port meanwhile. Raises EmberError when a request fails.
    """
    with _served(engine, tokenizer) as url:
        return asyncio.run(_median_overhead(url, roofline))


@contextmanager
def _served(engine: Engine, tokenizer: Tokenizer) -> Iterator[str]:
    lifecycle = Lifecycle()
    lifecycle.loaded(LoadedModel((NAME,), int(time.time()), engine, tokenizer))
    server = HttpServer(create_app(lifecycle, ServingSettings()), lifecycle, bind_socket(port=0), drain_seconds=1)
    thread = threading.Thread(target=server.run, name="emberkv-calibrate", daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


async def _median_overhead(url: str, roofline: Roofline) -> float:
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for index in range(ROUNDS + 1):
            for words in WORDS:
                script = Workload(user_tokens=words, nonce=f"calibrate {index} {words}")
                overhead = await _overhead(client, script, roofline)
                if index:  # the first round wakes what is loaded on first use
                    found.append(overhead)
    return max(0.0, statistics.median(found))


async def _overhead(client: httpx.AsyncClient, script: Workload, roofline: Roofline) -> float:
    answer = await ask(client, Target(NAME), [script.question(0, 0)], max_tokens=1, clock=time.perf_counter)
    usage = answer.usage
    if answer.error or usage is None or answer.ttft is None:
        raise EmberError(f"a request to measure by failed: {answer.error or 'it came without usage'}")
    work = Work(0, 0, (Chunk(usage.cached_tokens or 0, usage.prompt_tokens or 0, True),))
    return answer.ttft - roofline.terms_of(work).total
