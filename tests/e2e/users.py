"""Several users of one server at once, with prompts that share their beginnings, until it is killed."""

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import httpx

from tests.e2e.process import Server
from tests.models import VOCAB_SIZE
from tests.waiting import DEADLINE

Choice = Mapping[str, Any]


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]


BEGINNINGS = [random_tokens(random.Random(f"beginning {number}"), 320) for number in range(4)]
PROMPTS = [
    beginning[:length] + random_tokens(random.Random(f"end {number} {length}"), 20)
    for number, beginning in enumerate(BEGINNINGS)
    for length in (160, 320)
]
"""RequestContext again and again, so that their answers can be compared."""


def ask(client: httpx.Client, prompt: Sequence[int], max_tokens: int = 8) -> Choice:
    """The greedy answer: text, log-probabilities, reason to end."""
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 3,
        "ignore_eos": True,
    }  # fmt: skip
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice: Choice = response.json()["choices"][0]
    return choice


@contextmanager
def users(server: Server, expected: Sequence[Choice], *, count: int, seed: str) -> Iterator["SimpleQueue[int | None]"]:
    """So many at once; then the server is killed, in the middle of what they asked for.

    expected: the answers to ``PROMPTS``. The queue tells of each answer: of a wrong one the prompt's number, else None.
    """
    answered: SimpleQueue[int | None] = SimpleQueue()
    with ThreadPoolExecutor(count) as threads:
        working = [threads.submit(_use, server, expected, answered, f"{seed} {user}") for user in range(count)]
        try:
            yield answered
        finally:
            server.process.kill()
            server.exit_code()
        for each in working:
            each.result(DEADLINE)


def _use(server: Server, expected: Sequence[Choice], answered: "SimpleQueue[int | None]", seed: str) -> None:
    """Known prompts, new ones that begin like them, and answers broken off, until the server is gone."""
    rng = random.Random(seed)
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        try:
            while True:
                action = rng.random()
                if action < 0.3:
                    number = rng.randrange(len(PROMPTS))
                    right = ask(client, PROMPTS[number])["text"] == expected[number]["text"]
                    answered.put(None if right else number)
                    continue
                prompt = rng.choice(BEGINNINGS)[: rng.randrange(321)] + random_tokens(rng, rng.randint(1, 120))
                if action < 0.8:
                    ask(client, prompt, max_tokens=rng.randint(1, 40))
                else:
                    _break_off(client, prompt)
                answered.put(None)
        except httpx.TransportError:
            pass  # killed


def _break_off(client: httpx.Client, prompt: Sequence[int]) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())
