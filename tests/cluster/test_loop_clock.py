"""A gateway that stood still does not count that time as its workers' silence, and finds those that are silent."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import pytest

from emberkv.cluster.loop_clock import TICK_SECONDS, ClockTimeout, LoopClock
from emberkv.cluster.membership import Membership
from emberkv.cluster.routing import make_router
from emberkv.cluster.wire import LoadReport, WorkerDescription
from emberkv.cluster.worker_client import Deadlines, within
from emberkv.cluster.workers import Worker, WorkerStatus
from emberkv.core.feed import FeedMessage
from tests.cluster.fake_workers import FakeConnection, FakeWorker

T = TypeVar("T")

SILENCE = 5.0


class ShiftedLoop(asyncio.SelectorEventLoop):
    """Its time goes on by itself, and by what `shift` adds, during which the loop does not run."""

    def __init__(self) -> None:
        super().__init__()
        self._shift = 0.0

    def time(self) -> float:
        return super().time() + self._shift

    def shift(self, seconds: float) -> None:
        self._shift += seconds


def run(test: Callable[[ShiftedLoop], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=ShiftedLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, ShiftedLoop)
        return runner.run(test(loop))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def pass_by(loop: ShiftedLoop, seconds: float) -> None:
    """Time in which the loop runs."""
    for _ in range(round(seconds / TICK_SECONDS)):
        loop.shift(TICK_SECONDS)
        for _ in range(3):
            await asyncio.sleep(0)


def test_time_in_which_the_loop_did_not_run_is_left_out_whenever_it_is_asked_for() -> None:
    clock = Clock()
    running = LoopClock(clock)
    clock.now += 60
    assert running() == 160, "it does not follow the loop yet"

    async def test(loop: ShiftedLoop) -> None:
        running.start()
        clock.now += 0.1
        assert running() == pytest.approx(160.1)
        clock.now += 1000
        assert running() == pytest.approx(160 + TICK_SECONDS), "before the clock is looked at"
        loop.shift(TICK_SECONDS)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert running() == pytest.approx(160 + TICK_SECONDS), "after that"
        clock.now += 0.2
        assert running() == pytest.approx(160.2 + TICK_SECONDS)
        running.stop()
        clock.now += 60
        assert running() == pytest.approx(220.2 + TICK_SECONDS)

    run(test)


@pytest.mark.parametrize(("seconds", "ends"), [(SILENCE, True), (None, False)])
def test_patience_ends_after_so_much_time_in_which_the_loop_ran(seconds: float | None, ends: bool) -> None:
    async def test(loop: ShiftedLoop) -> bool:
        clock = LoopClock(loop.time)
        clock.start()
        waiting = asyncio.create_task(wait(seconds, clock))
        await asyncio.sleep(0)
        loop.shift(1000)
        await pass_by(loop, SILENCE - 1)
        assert not waiting.done()
        await pass_by(loop, 2)
        clock.stop()
        done = waiting.done()
        waiting.cancel()
        return done

    assert run(test) == ends


async def wait(seconds: float | None, clock: Callable[[], float]) -> None:
    with pytest.raises(TimeoutError):
        async with ClockTimeout(seconds, clock):
            await asyncio.Event().wait()


class Reporting(FakeConnection):
    """Sends a report whenever it is asked to; the client's deadline is on each."""

    def __init__(self, worker: FakeWorker, deadlines: Deadlines) -> None:
        super().__init__(worker)
        self._reports = worker
        self._deadlines = deadlines

    async def events(self, after: int = 0) -> AsyncGenerator[FeedMessage | LoadReport, None]:
        worker = self._reports
        while True:
            changed = worker.changed
            yield LoadReport(worker_id=worker.worker_id, epoch=worker.epoch, sequence=0)
            await within(worker.worker_id, self._deadlines, self._deadlines.silence, changed.wait())


@pytest.mark.parametrize("leaves_out", [True, False])
def test_after_a_standstill_no_worker_is_silent_and_later_the_one_that_is(leaves_out: bool) -> None:
    """leaves_out: whether the clock leaves out the time; where it does not, all workers are taken for silent."""

    async def test(loop: ShiftedLoop) -> list[str]:
        clock = LoopClock(loop.time)
        if leaves_out:
            clock.start()
        deadlines = Deadlines(silence=SILENCE, clock=clock)
        workers, silent = {name: FakeWorker(name) for name in "ab"}, set[str]()
        membership = Membership(
            make_router("round-robin", random.Random(0)),
            lambda url: Reporting(workers[url], deadlines),
            on_model=no_model,
            on_change=lambda: silent.update(each.url for each in followed if each.status is WorkerStatus.SILENT),
            clock=clock,
        )
        followed = [membership.add(name) for name in workers]
        while any(worker.status is not WorkerStatus.UP for worker in followed):
            await membership.changed()
        loop.shift(1000)
        for _ in range(5):
            await asyncio.sleep(0)
        found = ["".join(sorted(silent))]
        for _ in range(3):
            workers["b"].change()
            await pass_by(loop, SILENCE / 2)
        clock.stop()
        await membership.close()
        return [*found, "".join(sorted(silent))]

    assert run(test) == (["", "a"] if leaves_out else ["ab", "ab"])


async def no_model(_worker: Worker, _description: WorkerDescription) -> None: ...
