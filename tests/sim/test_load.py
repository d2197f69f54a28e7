"""Whether a set-up keeps up: decided by the requests that wait when arrivals end."""

from collections.abc import Iterable

import pytest

from emberkv.sim.outcome import RequestOutcome, Rows, Status, TurnKind
from emberkv.sim.summary import OfferedLoad, load_of
from tests.sim.build import single

SECOND = 10**9


def rows(*times: tuple[float, float | None], status: Status = Status.COMPLETED) -> Rows:
    """Arrival and first token of each, in seconds."""
    found = Rows()
    add(found, times, status)
    return found


def add(
    found: Rows,
    times: Iterable[tuple[float, float | None]],
    status: Status = Status.COMPLETED,
    turn: TurnKind = TurnKind.FIRST,
) -> None:
    for arrival, first in times:
        first_token = None if first is None else round(first * SECOND)
        request = single(f"r{len(found)}", 10, 1)
        found.add(RequestOutcome(request, status, round(arrival * SECOND), first_token, turn=turn))


def test_half_as_fast_as_requests_arrive_is_a_queue_without_end() -> None:
    """One request a second, each served two seconds after the one before."""
    found = load_of(rows(*((at, 2 * at + 0.5) for at in range(101))), replicas=3)
    assert found == OfferedLoad(1.01, 0.5, 51, True, 7)
    assert found is not None
    assert found.sentence == (
        "This set-up serves 0.5 of 1.01 requests a second: the queue grows without end; 7 replicas are the least."
    )


def test_as_fast_as_they_arrive_is_none_however_long_each_waits() -> None:
    found = load_of(rows(*((at, at + 20) for at in range(101))), replicas=3)
    assert found is not None
    assert (found.grows, found.waiting, found.least_replicas) == (False, 20, 3)


def test_a_burst_at_once_has_no_rate() -> None:
    assert load_of(rows((0, 1), (0, 2), (0, 3)), replicas=1) is None


def test_a_few_that_wait_at_the_end_are_no_queue() -> None:
    found = load_of(rows((0, 1), (1, 2), (2, 9), (3, 10)), replicas=1)
    assert found is not None
    assert not found.grows


def test_what_can_never_be_served_is_not_waited_for() -> None:
    assert load_of(rows((0, None), (5, None), status=Status.REJECTED), replicas=1) is None


@pytest.mark.parametrize("session", [True, False])
def test_follow_ups_do_not_stretch_the_time_in_which_requests_are_asked(session: bool) -> None:
    asked = rows(*((at, 2 * at + 0.5) for at in range(101)))
    add(asked, ((1000 + at, 1001 + at) for at in range(1, 50)), turn=TurnKind.CONTINUES if session else TurnKind.FIRST)
    found = load_of(asked, replicas=1)
    assert found is not None
    assert found.grows is session
