"""Background work that fails goes on, and is seen to have failed."""

import pytest

from emberkv.serving.background import BackgroundWork
from emberkv.serving.lifecycle import Lifecycle
from tests.serving.harness import Client


def test_an_observer_that_raises_is_called_again_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    work = BackgroundWork("ledger")
    seen: list[int] = []

    def observer(number: int) -> None:
        seen.append(number)
        if number % 2:
            raise ValueError(number)

    observe = work.guarded(observer)
    for number in range(12):
        observe(number)
    assert seen == list(range(12))
    assert (work.failures, work.running) == (6, True)
    assert [message.split(";")[0] for message in caplog.messages] == [
        f"ledger failed, {times} times by now" for times in (1, 2, 4)
    ]


def test_it_is_shown_in_ready_and_in_the_metrics(client: Client, lifecycle: Lifecycle) -> None:
    with lifecycle.background.work("ledger").attempt():
        raise ValueError
    lifecycle.background.work("recorder").ended("no space")
    assert client.get("/ready").json()["background"] == {
        "ledger": {"running": True, "failures": 1},
        "recorder": {"running": False, "failures": 0},
    }
    lines = client.get("/metrics").text.splitlines()
    assert 'emberkv_background_failures_total{work="ledger"} 1.0' in lines
    assert 'emberkv_background_running{work="recorder"} 0.0' in lines
