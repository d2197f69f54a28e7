"""The cache's events for observers in this process, step by step."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emberkv.core.events import Event, EventLog
from emberkv.core.sequence import Sequence as Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """What a step changed.

    time: seconds since 1970. admitted: the sequences admitted for the first time; their ``admission`` and
    ``cached_tokens`` are set, and they belong to the engine's thread. events: of the pool, in order; those that
    admissions caused are among them. missed: events before these are lost, so that only a snapshot of the pool says
    what is cached.
    """

    time: float
    admitted: Sequence[Prompt]
    events: Sequence[Event]
    missed: bool = False


CacheObserver = Callable[[CacheUpdate], None]
"""Called on the engine's thread after a step is planned and after it is done, where anything has changed; it must
return at once. It gets a request's admission before the request's first output, and before what the request commits.
"""


class CacheEventPublisher:
    """Hands the events of a log on to observers. admitted: the sequences admitted for the first time since the last
    `publish`, to be filled in by the loop.
    """

    def __init__(self, log: EventLog, wall_clock: Callable[[], float]) -> None:
        self.admitted: list[Prompt] = []
        self._log = log
        self._wall_clock = wall_clock
        self._observers: tuple[CacheObserver, ...] = ()
        self._changing = threading.Lock()  # of the observers, which any thread may add to
        self._published = log.last_sequence

    def add(self, observer: CacheObserver) -> None:
        """From any thread."""
        with self._changing:
            self._observers = (*self._observers, observer)

    def publish(self) -> None:
        """An observer that raises is not called again."""
        admitted, self.admitted = self.admitted, []
        events = self._log.since(self._published) if self._observers else ()
        self._published = self._log.last_sequence
        if not (admitted or events or events is None):
            return
        update = CacheUpdate(self._wall_clock(), admitted, events or (), missed=events is None)
        for observer in self._observers:
            try:
                observer(update)
            except Exception:  # noqa: BLE001 - logged; answers do not depend on observers
                _log.exception("an observer of the cache failed and is not called again: %s", _name(observer))
                with self._changing:
                    self._observers = tuple(each for each in self._observers if each is not observer)


def _name(observer: CacheObserver) -> str:
    """Of its function or method, or else of its class."""
    return f"{observer.__module__}.{getattr(observer, '__qualname__', type(observer).__qualname__)}"
