"""Work off the event loop: its results, its limits, and a process that exits whatever the work does."""

import asyncio
import contextlib
import subprocess
import sys
import threading

import pytest

from emberkv.serving.background import WorkerPool
from emberkv.serving.errors import OverloadedError
from tests.waiting import DEADLINE


def test_results_and_errors_reach_the_caller() -> None:
    async def use() -> list[object]:
        pool = WorkerPool(threads=2)
        works = [pool.run(lambda: 7), pool.run(lambda: 1 // 0), pool.run(lambda: 8)]
        return list(await asyncio.gather(*works, return_exceptions=True))

    first, second, third = asyncio.run(use())
    assert (first, third) == (7, 8)
    assert isinstance(second, ZeroDivisionError)


def test_work_that_finds_no_place_is_refused_and_cancelled_work_is_not_done() -> None:
    running, release, done = threading.Event(), threading.Event(), list[str]()

    def occupy() -> None:
        running.set()
        assert release.wait(DEADLINE)

    async def use() -> None:
        pool = WorkerPool(threads=1, waiting=1)
        first = asyncio.create_task(pool.run(occupy))
        await asyncio.to_thread(running.wait, DEADLINE)
        second = asyncio.create_task(pool.run(lambda: done.append("second")))
        await asyncio.sleep(0)  # until it has begun to wait
        with pytest.raises(OverloadedError):
            await pool.run(lambda: done.append("third"))
        second.cancel()
        await asyncio.wait([second])
        release.set()
        await first
        async with asyncio.timeout(DEADLINE):
            while not done:  # the cancelled work keeps its place until the thread comes to it
                with contextlib.suppress(OverloadedError):
                    await pool.run(lambda: done.append("fourth"))

    asyncio.run(use())
    assert done == ["fourth"]


def test_as_much_runs_at_once_as_there_are_threads() -> None:
    async def use() -> None:
        pool, both = WorkerPool(threads=2), threading.Barrier(2)
        await asyncio.gather(*(pool.run(lambda: both.wait(DEADLINE)) for _ in range(2)))

    asyncio.run(use())  # a barrier that one thread alone reaches would break


def test_a_process_exits_while_work_goes_on() -> None:
    script = """
import asyncio, threading
from emberkv.serving.background import WorkerPool

async def use():
    started = threading.Event()
    def never_ends():
        started.set()
        threading.Event().wait()
    task = asyncio.create_task(WorkerPool().run(never_ends))
    await asyncio.to_thread(started.wait)
    task.cancel()

asyncio.run(use())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=DEADLINE, check=False).returncode == 0
