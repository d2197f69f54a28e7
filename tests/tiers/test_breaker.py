"""The circuit breaker, against what it promises for every order of calls, answers and time."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emberkv.errors import ConfigError
from emberkv.tiers.breaker import Circuit, CircuitBreaker
from tests.tiers.harness import Clock

FIRST, LONGEST = 1.0, 6.0


class BreakerMachine(RuleBasedStateMachine):
    """At most one probe is on its way; a pause is the first one times two for each probe that failed in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(first_pause=FIRST, longest_pause=LONGEST, clock=self.clock)
        self.circuit = Circuit.CLOSED
        self.opened_at = 0.0
        self.failed_probes = 0

    @property
    def pause(self) -> float:
        return min(FIRST * 2**self.failed_probes, LONGEST)

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def probe(self) -> None:
        due = self.circuit is Circuit.OPEN and self.clock.now >= self.opened_at + self.pause
        assert self.breaker.begin_probe() is due
        if due:
            self.circuit = Circuit.HALF_OPEN

    @rule()
    def fail(self) -> None:
        self.breaker.failed()
        if self.circuit is not Circuit.OPEN:
            self.failed_probes += self.circuit is Circuit.HALF_OPEN
            self.circuit, self.opened_at = Circuit.OPEN, self.clock.now

    @precondition(lambda self: self.circuit is not Circuit.OPEN)
    @rule()
    def succeed(self) -> None:
        self.breaker.succeeded()
        if self.circuit is Circuit.HALF_OPEN:
            self.circuit, self.failed_probes = Circuit.CLOSED, 0

    @precondition(lambda self: self.circuit is Circuit.OPEN)
    @rule()
    def succeed_late(self) -> None:
        """A call that began before the circuit opened."""
        self.breaker.succeeded()

    @invariant()
    def is_as_modelled(self) -> None:
        assert self.breaker.circuit is self.circuit
        assert self.breaker.is_closed is (self.circuit is Circuit.CLOSED)


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=40, stateful_step_count=30)


@pytest.mark.parametrize(("first", "longest"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_pauses_that_cannot_be_are_refused(first: float, longest: float) -> None:
    with pytest.raises(ConfigError, match="use two above 0"):
        CircuitBreaker(first_pause=first, longest_pause=longest, clock=Clock())
