"""A circuit breaker: a server that fails is left alone for a while, and tried again by one probe at a time."""

import threading
from collections.abc import Callable
from enum import Enum

from emberkv.errors import ConfigError


class Circuit(Enum):
    """CLOSED: calls are made. OPEN: none is. HALF_OPEN: one probe is on its way, and decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Whether a server is to be called. Thread-safe, and without threads or timers of its own.

    first_pause, longest_pause: seconds until the first probe after a failure; each probe that fails doubles the pause,
    up to the longest. clock: seconds. Raises ConfigError for a first pause that is not above 0 or above the longest.

    >>> now = 0.0
    >>> breaker = CircuitBreaker(first_pause=1.0, longest_pause=8.0, clock=lambda: now)
    >>> breaker.failed()
    >>> breaker.circuit.value, breaker.begin_probe()
    ('open', False)
    >>> now = 1.0
    >>> breaker.begin_probe(), breaker.circuit.value
    (True, 'half_open')
    >>> breaker.succeeded()
    >>> breaker.circuit.value
    'closed'
    """

    def __init__(self, *, first_pause: float, longest_pause: float, clock: Callable[[], float]) -> None:
        if not 0 < first_pause <= longest_pause:
            raise ConfigError(
                f"pauses of {first_pause} to {longest_pause} seconds; use two above 0, the longest one last"
            )
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._clock = clock
        self._lock = threading.Lock()
        self._circuit = Circuit.CLOSED
        self._pause = first_pause
        self._probe_at = 0.0

    @property
    def circuit(self) -> Circuit:
        return self._circuit

    @property
    def is_closed(self) -> bool:
        """Whether calls other than a probe are to be made."""
        return self._circuit is Circuit.CLOSED

    def begin_probe(self) -> bool:
        """Whether the caller is to make the one call that decides, to be followed by `succeeded` or `failed`."""
        with self._lock:
            due = self._circuit is Circuit.OPEN and self._clock() >= self._probe_at
            if due:
                self._circuit = Circuit.HALF_OPEN
            return due

    def succeeded(self) -> None:
        """The server has answered: where a probe was on its way, calls are made again."""
        with self._lock:
            if self._circuit is Circuit.HALF_OPEN:
                self._circuit = Circuit.CLOSED
                self._pause = self._first_pause

    def failed(self) -> None:
        """A call has failed. Of calls that fail together, one alone lengthens the pause."""
        with self._lock:
            if self._circuit is Circuit.OPEN:
                return
            if self._circuit is Circuit.HALF_OPEN:
                self._pause = min(2 * self._pause, self._longest_pause)
            self._circuit = Circuit.OPEN
            self._probe_at = self._clock() + self._pause
