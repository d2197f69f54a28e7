"""Waiting for what another thread, task or process does, with one deadline for all tests."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")

DEADLINE = 120.0
"""Seconds after which a test gives up. It is far more than what it waits for takes on a slow machine that is busy."""


def eventually(condition: Callable[[], object]) -> None:
    """Poll until the condition holds; fail at the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


async def until(condition: Callable[[], object], meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
    """`eventually` in an event loop. meanwhile: is awaited before each further look."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        if meanwhile is not None:
            await meanwhile()
        await asyncio.sleep(0.001)


def on_a_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """A test that is a coroutine, in an event loop of its own."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def within_the_deadline() -> None:
            async with asyncio.timeout(2 * DEADLINE):
                await test(*args, **kwargs)

        asyncio.run(within_the_deadline())

    return run
